import numpy as np

from dit_jax.data.arrays import Arrays


def make(image, label):
    return Arrays(np.array(image, np.uint8), np.array(label, np.int32), ("a", "b"))


def test_the_digest_depends_on_all_of_the_content():
    image = np.arange(8).reshape(2, 2, 2, 1)
    sources = [
        make(image, [0, 1]),
        make(image, [1, 0]),
        make(image[::-1], [0, 1]),
        make(image.reshape(2, 4, 1, 1), [0, 1]),
    ]
    digests = [source.sha256 for source in sources]
    assert len(set(digests)) == 4 and digests[0] == make(image.copy(), [0, 1]).sha256
