import json

import numpy as np
import pytest

from dit_jax.data import arrayrecord, latents
from dit_jax.errors import UserError

SHAPE = (2, 3, 4, 6)
NAMES = ("a", "b", "c d", "e,f", "g", "h", "i")
PLAN = {
    **{"vae": {"channels": [8]}, "vae_digests": {"conv": "x" * 100}, "split": "train", "size": 16},
    **{"dtype": "float16", "examples_per_shard": 4, "num_examples": 10, "num_classes": 7},
    "shape": list(SHAPE),
}


def make_examples(count=10):
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((count, *SHAPE), dtype=np.float32)
    return [(i % 7, x) for i, x in enumerate(moments)]


def write(out, plan, examples):
    out.mkdir(exist_ok=True)
    latents.claim(out, plan)
    ranges = latents.shard_ranges(len(examples), plan["examples_per_shard"])
    for name, indices in ranges.items():
        latents.write_shard(out, name, [examples[i] for i in indices], plan["dtype"])
    latents.finish(out, plan, ranges, NAMES)


@pytest.fixture
def cache(tmp_path):
    """A finished cache of 10 examples in float16."""
    write(tmp_path / "cache", PLAN, make_examples())
    return tmp_path / "cache"


@pytest.mark.parametrize("dtype, rtol", [("float16", 2**-11), ("float32", 0)])  # of its rounding
def test_examples_are_read_as_written(tmp_path, dtype, rtol):
    examples = make_examples()
    write(tmp_path / "cache", PLAN | {"dtype": dtype}, examples)
    source = latents.open_latents(tmp_path / "cache")
    assert len(source) == 10 and source.num_classes == 7 and source.split == "train"
    assert source.shape == SHAPE and source.dtype == dtype and source.vae == PLAN["vae"]
    assert source.class_names == NAMES
    for i, (label, moments) in enumerate(examples):
        example = source[i]
        assert example["label"] == label and example["label"].dtype == np.int32
        assert example["moments"].dtype == np.float32
        np.testing.assert_allclose(example["moments"], moments, rtol=rtol, atol=3e-8)


def test_a_cache_without_class_names_opens_and_gets_them_when_it_is_written_again(cache):
    manifest = json.loads((cache / "manifest.json").read_text())
    del manifest["class_names"]  # as older versions wrote it
    (cache / "manifest.json").write_text(json.dumps(manifest))
    assert latents.open_latents(cache).class_names == ()
    write(cache, PLAN, make_examples())
    assert latents.open_latents(cache).class_names == NAMES


def test_record_is_a_little_endian_label_then_the_moments(tmp_path):
    record = b"\x05\x01\x00\x00" + b"\x00\x3c" + b"\x00\xc0"  # 261; float16 1 and -2
    example = latents.parse(record, (2, 1, 1, 1), "float16")
    assert example["label"] == 261
    np.testing.assert_array_equal(example["moments"].ravel(), [1, -2])


def test_shard_ranges_cover_every_example_once():
    ranges = latents.shard_ranges(10, 4)
    assert list(ranges) == [f"latents.array_record-0000{i}-of-00003" for i in range(3)]
    assert [i for indices in ranges.values() for i in indices] == list(range(10))
    assert max(map(len, ranges.values())) == 4
    assert list(latents.shard_ranges(8, 4).values()) == [range(4), range(4, 8)]


def test_half_of_the_draws_pick_the_mirror_image():
    example = {"moments": np.stack([np.zeros((3, 4, 6)), np.ones((3, 4, 6))]), "label": 3}
    rng = np.random.default_rng(0)
    picked = [latents.pick_at_random(example, rng) for _ in range(1000)]
    assert all(x["moments"].shape == (3, 4, 6) and x["label"] == 3 for x in picked)
    assert abs(np.mean([x["moments"].mean() for x in picked]) - 0.5) < 0.05
    assert (latents.pick_first(example, rng)["moments"] == 0).all()


def test_unfinished_cache_is_not_opened(tmp_path):
    (tmp_path / "cache").mkdir()
    latents.claim(tmp_path / "cache", PLAN)
    assert latents.read_manifest(tmp_path / "cache") is None
    with pytest.raises(UserError, match="data.path must be a finished directory of dit-encode"):
        latents.open_latents(tmp_path / "cache")


def test_cut_shard_is_not_opened_and_is_written_again(cache):
    names = list(latents.read_manifest(cache)["shards"])
    assert list(latents.find_written(cache)) == names
    path = cache / names[1]
    path.write_bytes(path.read_bytes()[:-10])
    assert list(latents.find_written(cache)) == [names[0], names[2]]
    with pytest.raises(
        UserError, match="must have .* bytes, got .*: repeat the command that wrote"
    ):
        latents.open_latents(cache)


def test_finished_shards_of_an_unfinished_cache_are_found(tmp_path):
    latents.claim(tmp_path, PLAN)
    latents.write_shard(
        tmp_path, "latents.array_record-00001-of-00003", make_examples(4), "float16"
    )
    ((name, entry),) = latents.find_written(tmp_path).items()
    assert name == "latents.array_record-00001-of-00003" and entry["examples"] == 4
    latents.claim(tmp_path, PLAN)  # a resumed run
    assert list(latents.find_written(tmp_path)) == [name]


def test_a_plan_without_a_shard_may_be_replaced(tmp_path):
    for size in (32, 16):
        latents.claim(tmp_path, PLAN | {"size": size})
    written = json.loads((tmp_path / arrayrecord.PROGRESS / "plan.json").read_text())
    assert written == json.loads(json.dumps(PLAN))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 32}, "size must be 16, as in .*/cache, got 32"),
        ({"dtype": "float32"}, 'dtype must be "float16", as in .*/cache, got "float32"'),
        ({"vae_digests": {}}, "vae_digests must be [0-9a-f]{16}, as in .*/cache, got {}"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_cache_of_another_plan_is_not_resumed(cache, change, message, finished):
    if not finished:
        latents.claim(cache, PLAN)
        (cache / "manifest.json").unlink()
        (cache / arrayrecord.PROGRESS / "plan.json").write_text(json.dumps(PLAN))
    with pytest.raises(UserError, match=message):
        latents.claim(cache, PLAN | change)


def test_folder_with_other_files_is_not_claimed(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    message = "OUT must be new, empty or written by dit-encode, got .* with thesis.txt"
    with pytest.raises(UserError, match=message):
        latents.claim(tmp_path, PLAN)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_finished_cache_has_only_shards_and_the_manifest(cache):
    names = set(latents.shard_ranges(10, 4)) | {"manifest.json"}
    assert {path.name for path in cache.iterdir()} == names
