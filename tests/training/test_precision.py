"""torch.compile keeps names and numbers; TF32 is asked for where there is some."""

import shutil
import warnings

import pytest
import torch

from latentvae.errors import UserError
from latentvae.training.precision import check_compiler, set_tf32
from tests.training.updaters import GLOBAL_BATCH, make_updater, micro_batches, moved, run, weights

EVERYTHING = {"likelihood": "learned", "latent_noise": 0.5, "equivariance": 0.7, "equivariance_scales": (12, 31)}


@pytest.fixture
def use_backend(monkeypatch):
    """A function name => torch.compile without code generation, by graphs all the same."""
    compile_ = torch.compile
    torch._dynamo.reset()
    yield lambda name: monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend=name))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "precision", "loss"),
    [
        ("eager", "no", {"likelihood": "learned", "latent_noise": 0.5}),
        pytest.param("eager", "bf16", EVERYTHING, marks=pytest.mark.slow),
        pytest.param("aot_eager", "no", EVERYTHING, marks=pytest.mark.slow),
    ],
)
def test_compiled_networks_have_the_same_names_and_train_alike(use_backend, backend, precision, loss):
    use_backend(backend)
    plain = make_updater({"mixed_precision": precision}, loss)
    compiled = make_updater({"mixed_precision": precision, "compile": True}, loss)
    assert compiled.step._compiled_call_impl is not None and compiled.discriminator._compiled_call_impl is not None
    assert weights(plain).keys() == weights(compiled).keys()
    assert compiled.vae.state_dict().keys() == plain.vae.state_dict().keys()
    first, second = run(plain, 3), run(compiled, 3)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "no" else {"rtol": 0.05, "atol": 0.02}
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b["reconstruction"], a["reconstruction"], **tolerance)
        torch.testing.assert_close(b["autoencoder_grad_norm"], a["autoencoder_grad_norm"], **tolerance)


@pytest.mark.slow
def test_a_step_that_is_wrapped_anew_is_compiled_anew(use_backend):
    use_backend("eager")
    updater = make_updater({"compile": True, "decoder_only_start": 4})
    run(updater, 1)
    before = weights(updater)
    run(updater, 1, start=4)
    assert updater.step._compiled_call_impl is not None
    assert not any(".encoder." in name for name in moved(before, weights(updater)))


@pytest.mark.slow
def test_shrunk_images_of_all_sizes_need_few_graphs(use_backend):
    """Beyond the limit of graphs, torch.compile would go on without compiling."""
    graphs = []
    use_backend(lambda graph, _: graphs.append(graph) or graph)
    updater = make_updater({"compile": True}, EVERYTHING | {"equivariance_scales": (8, 31)})
    for images_seen in range(0, 80, GLOBAL_BATCH):
        updater.update(micro_batches(updater, images_seen, side=32), images_seen, stop=False)
    count = len(graphs)
    for images_seen in range(80, 160, GLOBAL_BATCH):
        updater.update(micro_batches(updater, images_seen, side=32), images_seen, stop=False)
    assert len(graphs) == count < 20


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_for_real_it_trains_alike():
    torch._dynamo.reset()
    plain, compiled = make_updater(loss=EVERYTHING), make_updater({"compile": True}, EVERYTHING)
    for a, b in zip(run(plain, 3), run(compiled, 3), strict=True):
        torch.testing.assert_close(b["reconstruction"], a["reconstruction"], rtol=1e-4, atol=1e-5)


def test_a_machine_that_cannot_compile_is_told_before_any_work(monkeypatch):
    def fails(model):
        def call(x):
            raise RuntimeError("No working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match=r"does not work on cpu \(RuntimeError: No working C\+\+.*compile=false"):
        check_compiler(torch.device("cpu"))


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_for_products_and_convolutions_without_a_warning(allowed):
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            set_tf32(torch.device("cuda"), allowed=allowed)
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)
        set_tf32(torch.device("cpu"), allowed=not allowed)  # nothing to set
        assert torch.backends.cuda.matmul.allow_tf32 == allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution
