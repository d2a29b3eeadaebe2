import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_run

import dit_jax
from dit_jax.diffusion import samplers
from dit_jax.errors import UserError
from dit_jax.models import dit, pixels, vae
from dit_jax.sampling import autoencoder, generate

X, T, Y = np.ones((2, 8, 8, 1), np.float32), np.array([0, 999]), np.array([0, 10])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory, its parameters and their EMA."""
    path = tmp_path_factory.mktemp("run")
    return path, *random_run.save(path)


@pytest.fixture(scope="module")
def model(run):
    """One for all tests, so that each of its programs compiles once."""
    return dit_jax.load(run[0])


def test_the_ema_is_loaded_by_default(run):
    path, params, ema = run
    model = dit_jax.load(path)
    assert model.step == 30
    assert model.config.hidden_size == 128 and model.config.input_size == (8, 8)
    np.testing.assert_array_equal(
        model.params["x_embedder"]["proj"]["kernel"], ema["x_embedder"]["proj"]["kernel"]
    )
    plain = dit_jax.load(path / "checkpoints", weights="params")
    np.testing.assert_array_equal(
        plain.params["x_embedder"]["proj"]["kernel"], params["x_embedder"]["proj"]["kernel"]
    )


def test_a_call_is_the_forward_pass_inside_a_jit_too(run, model):
    ema = run[2]
    x, t, y = jnp.ones((8, 8, 8, 1)), jnp.arange(8), jnp.arange(8)
    out = model(x, t, y)
    assert out.shape == (8, 8, 8, 2) and out.dtype == jnp.float32
    expected = dit.make_apply(model.config)(ema, x, t=t, y=y)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(model)(x, t, y), out, rtol=1e-4, atol=1e-5)
    assert model(x[:1], [5], [10]).shape == (1, 8, 8, 2)  # lists; the null label


def test_a_watched_call_is_the_call_and_shows_the_blocks(model):
    out, watched = model.watch(X, T, Y)
    np.testing.assert_allclose(out, model(X, T, Y), rtol=1e-4, atol=1e-5)
    assert watched.x.shape == (5, 2, 4, 128) and watched.attention.shape == (4, 2, 4, 4, 4)
    with pytest.raises(UserError, match="t must be in 0 .. 999, got 1000"):
        model.watch(X, [0, 1000], Y)


def test_samples_follow_labels_seed_and_options(model):
    images = model.sample([3, 1, 4])
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, model.sample(np.array([3, 1, 4])))
    for options in ({"seed": 1}, {"cfg_scale": 1.0}, {"num_steps": 6}, {"cfg_interval": [0, 400]}):
        assert not np.array_equal(images, model.sample([3, 1, 4], **options)), options
    plain = model.sample([3], cfg_interval=(0, 400), cfg_scale=3.0, seed=2**32 - 1)
    arrays = {"cfg_interval": np.array([0, 400]), "cfg_scale": jnp.float32(3)}
    np.testing.assert_array_equal(plain, model.sample([3], **arrays, seed=2**32 - 1))


def noise_of(seed, count, num_steps):
    """What the keys of a seed draw for images of random_run."""
    noise_at = samplers.make_noise(
        generate.image_keys(np.uint32(seed), count), (8, 8, 1), num_steps
    )
    return np.asarray(noise_at(-1))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_many_images_can_be_drawn_in_parts(model, sampler):
    options = {"sampler": sampler, "num_steps": 4, "seed": 5, "batch_size": 8}
    labels = np.arange(16) % 10
    later = model.sample(labels[8:], first=8, **options)
    np.testing.assert_array_equal(later, model.sample(labels, **options)[8:])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_given_noise_is_where_sampling_starts(model, sampler):
    drawn = functools.partial(model.sample, [3, 1, 4], sampler=sampler, num_steps=4, seed=5)
    noise = noise_of(5, 3, 4)
    np.testing.assert_array_equal(drawn(noise=noise), drawn())
    np.testing.assert_array_equal(drawn(noise=noise.tolist(), batch_size=1), drawn())
    np.testing.assert_array_equal(drawn(noise=jnp.asarray(noise)), drawn())
    assert not np.array_equal(drawn(noise=-noise), drawn())
    later = model.sample([3, 1, 4], sampler=sampler, num_steps=4, seed=6, noise=noise)
    assert np.array_equal(later, drawn()) == (sampler == "ddim")  # ddpm draws in every step


NEW = [
    {"sampler": "sde"},
    *(
        pytest.param(options, marks=pytest.mark.slow)
        for options in (
            {"sampler": "euler"},
            {"sampler": "heun"},
            {"sampler": "dpm2m"},
            {"sampler": "unipc"},
            {"spacing": "trailing"},
            {"num_steps": "999,600,300,20"},
            {"cfg_schedule": "linear"},
        )
    ),
]


@pytest.mark.parametrize("options", NEW)
def test_samplers_spacings_and_schedules_reach_the_samples(model, options):
    usual = {"clip_x0": False, "num_steps": 4, "sampler": "ddpm"}
    images = model.sample([3, 1], **usual | options)
    assert images.shape == (2, 8, 8, 1) and images.dtype == np.uint8
    assert not np.array_equal(images, model.sample([3, 1], **usual))
    alone = model.sample([1], **usual | options, first=1)
    np.testing.assert_allclose(alone[0].astype(int), images[1], atol=1)  # a pixel at a rounding


@pytest.fixture(scope="module")
def path_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("path")
    shape = random_run.MODEL | {"learn_sigma": False}
    sampling = random_run.CONFIG["sampling"] | {"cfg_interval": [0, 1]}
    config = {"model": shape, "diffusion": {"process": "linear"}, "sampling": sampling}
    random_run.save(path, random_run.CONFIG | config, model=dit.configure(**shape))
    return dit_jax.load(path)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "unipc", "shift": 3.0, "cfg_interval": (0.2, 0.7)},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"sampler": "sde", "sde_noise": "decreasing", "sde_last": 0.1},
                {"sampler": "heun", "num_steps": "1,0.8,0.3"},
                {"sampler": "dpm2m", "spacing": "log_snr"},
            )
        ),
    ],
)
def test_a_path_has_samplers_and_times_of_its_own(path_model, options):
    images = path_model.sample([3, 1], **options)
    assert images.shape == (2, 8, 8, 1) and images.dtype == np.uint8
    assert not np.array_equal(images, path_model.sample([3, 1]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cfg_interval": (0, 500)}, "cfg_interval must be first <= last in 0 .. 1, got"),
        ({"spacing": "leading"}, "spacing must be auto, linspace, trailing or log_snr for a path"),
        ({"num_steps": "1,0"}, "num_steps must be times above 0 and at most 1, got 1,0"),
        ({"num_steps": 1}, "num_steps must be in 2 .. 100000, got '1'"),
        (
            {"sampler": "sde", "sde_last": 0.1, "num_steps": "1,0.5"},
            "sde_last must be 0.04 unless a",
        ),
        (
            {"sampler": "sde", "sde_noise": "sbdm"},
            "sde_noise must be finite where sampling begins, got sbdm at alpha 0",
        ),
    ],
)
def test_what_a_path_has_not_is_named(path_model, options, message):
    with pytest.raises(UserError, match=message):
        path_model.sample([3], **options)


def test_an_inversion_leads_to_noise_from_which_ddim_makes_the_images(model):
    """The random network is no denoiser, but DDIM has an inverse."""
    steps = {"num_steps": 8, "spacing": "log_snr"}
    back = {"sampler": "ddim", "cfg_scale": 1.0, "clip_x0": False} | steps
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    noise = model.invert(images, [3, 1, 4], iterations=8, **steps)
    assert noise.shape == (3, 8, 8, 1) and noise.dtype == np.float32
    again = model.sample([3, 1, 4], noise=noise, **back)
    np.testing.assert_allclose(again.astype(int), images, atol=1)
    edited = model.sample([5, 5, 5], noise=noise, **back)
    assert np.abs(edited.astype(int) - images).max() > 5
    x0 = np.asarray(pixels.to_unit(images))
    np.testing.assert_array_equal(model.invert(x0, [3, 1, 4], iterations=8, **steps), noise)


@pytest.mark.parametrize(
    "images, options, message",
    [
        (X[:1], {"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
        (X[:1], {"cfg_scale": 2}, "option of an inversion must be num_steps, .*, got cfg_scale"),
        (X[:1], {"num_steps": 1}, "num_steps must be in 2 .. 1000, got '1'"),
        (X[:1] * np.nan, {}, "images must be finite, got nan"),
        (X, {}, r"images must have shape \(1, 8, 8, 1\), got \(2, 8, 8, 1\)"),
        (np.zeros((1, 9, 8, 1), np.uint8), {}, r"images must have shape \(1, 8, 8, 1\), got"),
        ("cat", {}, "images must be an array of numbers, got 'cat'"),
    ],
)
def test_invert_names_bad_arguments(model, images, options, message):
    with pytest.raises(UserError, match=message):
        model.invert(images, [3], **options)


def test_a_trajectory_ends_with_the_sample(model):
    images = model.sample([3, 1, 4])
    trajectory = model.sample([3, 1, 4], trajectory=True, batch_size=2)
    assert trajectory.shape == (5, 3, 8, 8, 1) and trajectory.dtype == np.uint8
    np.testing.assert_array_equal(trajectory[-1], images)
    noise = pixels.to_uint8(noise_of(0, 3, 4))
    np.testing.assert_array_equal(trajectory[0], noise)
    assert len(trajectory) == len(model.schedule.sigma)


def test_a_trajectory_has_the_predicted_x0_at_the_levels_that_are_asked_for(model):
    path = model.sample([3, 1, 4], trajectory=True)
    both = model.sample([3, 1, 4], trajectory="x0", levels=[0, 3, 4])
    assert both.shape == (2, 3, 3, 8, 8, 1) and both.dtype == np.uint8
    np.testing.assert_array_equal(both[0], path[[0, 3, 4]])
    np.testing.assert_array_equal(both[1, 2], both[0, 2])  # at the data, x0 is the sample
    assert not np.array_equal(both[1, 0], both[0, 0])
    # ddim's last step goes to the x0 that it predicts
    assert np.abs(both[1, 1].astype(int) - both[0, 2]).max() <= 1


def test_images_can_have_the_same_noise(model):
    options = {"sampler": "ddpm", "seed": 5, "batch_size": 8}  # ddpm draws noise in every step
    images = model.sample([3, 3, 1], same_noise=True, **options)
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[:1], model.sample([3], **options))
    second = model.sample([3, 1], same_noise=True, first=1, **options)
    np.testing.assert_array_equal(second[0], model.sample([3, 3], **options)[1])


def test_a_trajectory_of_latents_is_decoded_at_every_level(run, tmp_path):
    config = random_run.CONFIG | {"data": {"source": "imagenet", "space": "latents"}}
    random_run.save(tmp_path, config)
    small = vae.VAEConfig(latent_channels=1, channels=(8, 16), num_resnets=1, num_groups=4)
    autoencoder.save(tmp_path / "vae", small, random_run.weights(vae.init, small))
    latents = dit_jax.load(tmp_path).sample([3, 1], trajectory=True)
    assert latents.shape == (5, 2, 8, 8, 1) and latents.dtype == np.float32
    model = dit_jax.load(tmp_path, vae=tmp_path / "vae")
    images = model.sample([3, 1], trajectory=True)
    assert images.shape == (5, 2, 16, 16, 3) and images.dtype == np.uint8
    for level in (2, -1):
        np.testing.assert_array_equal(images[level], model.decoder.decode(latents[level]))


def test_weights_lie_between_labels(run, model):
    ema = run[2]
    one_hot = np.eye(10)[[3, 1]]
    # float32 sums may differ in the last bit, which rounding to a pixel can turn into 1
    difference = model.sample(one_hot).astype(int) - model.sample([3, 1])
    assert np.abs(difference).max() <= 1
    half = (one_hot[:1] + one_hot[1:]) / 2
    x, table = jnp.ones((1, 8, 8, 1)), ema["y_embedder"]["embedding_table"]["embedding"]
    table = table.at[7].set((table[3] + table[1]) / 2)
    mixed = ema | {"y_embedder": {"embedding_table": {"embedding": table}}}
    seven = dit.make_apply(model.config)(mixed, x, t=jnp.ones(1), y=jnp.asarray([7], jnp.int32))
    np.testing.assert_allclose(model(x, 1, half), seven, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(model)(x, 1, half), seven, rtol=1e-4, atol=1e-5)


def test_guidance_of_weights_is_guidance_of_labels(model):
    guided = [model.sample(y, cfg_scale=4.0) for y in ([2, 5], np.eye(10, dtype=int)[[2, 5]])]
    assert np.abs(guided[0].astype(int) - guided[1]).max() <= 1  # as above


def test_one_time_may_stand_for_all_and_lie_between_steps(model):
    x, y = np.ones((3, 8, 8, 1)), [3, 1, 10]
    out = model(x, [7, 7, 7], y)
    for t in (7, 7.0, np.float64(7), jnp.int32(7)):
        np.testing.assert_array_equal(model(x, t, y), out)
    assert np.abs(model(x, 7.5, y) - out).max() > 1e-6


def test_a_step_of_a_run_can_be_chosen(tmp_path):
    random_run.save(tmp_path, step=10)
    random_run.save(tmp_path, step=20)
    assert dit_jax.load(tmp_path).step == 20 and dit_jax.load(tmp_path, step=10).step == 10
    with pytest.raises(UserError, match="step must be one of 10, 20, got 15"):
        dit_jax.load(tmp_path, step=15)


def test_a_model_knows_its_size_process_and_levels(run, model):
    assert model.num_params == sum(x.size for x in jax.tree.leaves(run[1]))
    assert model.process.last_time == 999
    levels = model.schedule
    np.testing.assert_array_equal(levels.time, [999, 666, 333, 0, 0])
    np.testing.assert_allclose(levels.alpha**2 + levels.sigma**2, 1)
    assert levels.sigma[-1] == 0 and levels.num_steps == 4
    assert model.process.levels("1000").num_steps == model.process.levels(1000).num_steps == 1000


def test_samples_that_are_not_finite_are_refused(model):
    with pytest.raises(UserError, match="finite, got NaN or infinity in 2 of 2: lower cfg_scale"):
        model.sample([3, 1], cfg_scale=1e38, clip_x0=False)


def test_repr_names_size_design_step_and_weights(model):
    assert repr(model) == "LoadedDiT(Ti/4 adaln_zero, step 30, ema)"


@pytest.mark.parametrize(
    "labels, options, message",
    [
        ([3, 10], {}, "labels must be in 0 .. 9, got 10"),
        ([-1], {}, "labels must be in 0 .. 9, got -1"),
        ([0.5], {}, r"labels must be a list of whole numbers, got \[0.5\]"),
        ([], {}, "labels must be a list of whole numbers"),
        (3, {}, "labels must be a list of whole numbers, got 3"),
        ([[1], [2, 3]], {}, r"labels must be a list of whole numbers, got \[\[1\], \[2, 3\]\]"),
        ([10**22], {}, "labels must be in 0 .. 9, got 10000000000000000000000"),
        ([True], {}, r"labels must be a list of whole numbers, got \[True\]"),
        ([3], {"seed": -1}, "seed must be a whole number in 0 .. 4294967295, got -1"),
        ([3], {"seed": 2**32}, "seed must be a whole number in 0 .. 4294967295, got 4294967296"),
        ([3], {"seed": None}, "seed must be a whole number in 0 .. 4294967295, got None"),
        ([3], {"first": -1}, "first must be a whole number in 0 .. 4294967294, got -1"),
        ([3], {"first": 1.0}, "first must be a whole number in 0 .. 4294967294, got 1.0"),
        ([3], {"batch_size": 2.5}, "batch_size must be a whole number of at least 1, got 2.5"),
        ([3], {"batch_size": "a"}, "batch_size must be a whole number of at least 1, got 'a'"),
        ([3], {"cfg_scale": "2"}, "cfg_scale must be a number, got '2'"),
        ([3], {"cfg_scale": None}, "cfg_scale must be a number, got None"),
        ([3], {"num_steps": None}, "num_steps must be a whole number, as .*, got None"),
        ([3], {"cfg_interval": None}, "cfg_interval must be a list, got None"),
        ([3], {"cfg_interval": [[0], [1]]}, "cfg_interval must be two numbers"),
        ([3], {"sampler": ["ddim"]}, "sampler must be one of ddpm, ddim, euler, .*, got"),
        ([3], {"clip_x0": "no"}, "clip_x0 must be true or false, got 'no'"),
        ([3], {"scale": 2}, "a sampling option must be one of sampler, .*, got scale"),
        ([3], {"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ([3], {"noise": X[0]}, r"noise must have shape \(1, 8, 8, 1\), got \(8, 8, 1\)"),
        ([3], {"noise": X[:1] * np.nan}, "noise must be finite, got nan"),
        ([3], {"noise": "zeros"}, "noise must be an array of numbers, got 'zeros'"),
        ([3], {"progress": 3}, "progress must be true or false, got 3"),
        ([3], {"trajectory": 5}, "trajectory must be true, false or 'x0', got 5"),
        ([3], {"levels": [1]}, r"levels must be None without trajectory, got \[1\]"),
        ([3], {"levels": [5], "trajectory": True}, "levels must be in 0 .. 4, got 5"),
        ([3], {"levels": [0.5], "trajectory": True}, "levels must be a list of whole numbers, got"),
        ([3], {"sampler": "plms"}, "sampler must be one of ddpm, ddim, .*, unipc, got 'plms'"),
        ([3], {"spacing": "even"}, "spacing must be one of auto, linspace, .*, got 'even'"),
        ([3], {"num_steps": "9,7,x"}, "num_steps must be a whole number, as .*, got '9,7,x'"),
        ([3], {"num_steps": "9,12"}, "num_steps must be times that descend, got 9,12"),
        ([3], {"shift": 2}, "shift must be 0 for process ddpm, which counts steps, got 2.0"),
    ],
)
def test_sample_names_bad_arguments(model, labels, options, message):
    with pytest.raises(ValueError, match=message):
        model.sample(labels, **options)


@pytest.mark.parametrize(
    "x, t, y, message",
    [
        (X[..., 0], T, Y, r"\(N, 8, 8, 1\), \(N,\) and \(N,\), .*, got \(2, 8, 8\), \(2,\) and"),
        (X, T[:1], Y, r"x, t and y must have shapes .* got \(2, 8, 8, 1\), \(1,\) and \(2,\)"),
        (X, 5, 3, r"x, t and y must have shapes .* got \(2, 8, 8, 1\), \(\) and \(\)"),
        (X[:0], [], [], "x, t and y must have shapes .*, N at least 1, got"),
        (None, T, Y, "x must be an array of numbers, got None"),
        (X, "t", Y, "t must be an array of numbers, got 't'"),
        (X, T, [[1], [2, 3]], "y must be an array of numbers, got"),
        (X, [0, 1000], Y, "t must be in 0 .. 999, got 1000"),
        (X, [-1, 0], Y, "t must be in 0 .. 999, got -1"),
        (X, [0.5, np.nan], Y, "t must be in 0 .. 999, got nan"),
        (X, T, [11, 0], "y must be in 0 .. 10, got 11"),
    ],
)
def test_call_names_bad_arguments(model, x, t, y, message):
    with pytest.raises(ValueError, match=message):
        model(x, t, y)


def test_load_names_bad_arguments(run, tmp_path):
    with pytest.raises(ValueError, match="must be a directory with a saved step, got .*nothing"):
        dit_jax.load(tmp_path / "nothing")
    for nothing in (None, "", 3):
        with pytest.raises(UserError, match=f"^checkpoint must be a directory .*got {nothing!r}$"):
            dit_jax.load(nothing)
    with pytest.raises(UserError, match="^vae must be a folder that .* wrote, got ''$"):
        dit_jax.load(run[0], vae="")
    with pytest.raises(ValueError, match="weights must be ema or params, got 'best'"):
        dit_jax.load(run[0], weights="best")
    with pytest.raises(ValueError, match="'cudnn' only on a GPU"):
        dit_jax.load(run[0], attention="cudnn")
