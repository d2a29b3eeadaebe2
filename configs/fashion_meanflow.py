"""MeanFlow on Fashion-MNIST: each sample is one network call.

    dit-train configs/fashion_meanflow.py runs/fashion-one-step --config.data.path=FOLDER

FOLDER has the four IDX files of the data set: see configs/fashion.py.
"""

from configs import digits_meanflow, fashion


def get_config(variant="Ti/7"):
    return digits_meanflow.set_mean_flow(fashion.get_config(variant), total_steps=9000)
