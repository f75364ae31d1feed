"""apply and revert on AdapterHub's models: equal logits and gradients, every fallback counted, its features as before."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.adapterhub.models import ARCHITECTURES, HIDDEN, KINDS, activate, base, build, randomize, run, tokens

import adapters
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack
from adapters.methods.modeling import Adapter, ParallelAdapter
from transformers.activations import ACT2CLS

import peft_kernels as pk
from peft_kernels.integrations import adapterhub_layers
from peft_kernels.integrations.adapterhub_activations import ACTIVATIONS
from peft_kernels.integrations.adapterhub_layers import FusedAdapter, FusedParallelAdapter
from python_ref import compare

# Two orders of the same float32 sums through two layers, in parts of a tensor's largest value. The largest difference
# among the tests that use it was 28 eps; the least mistake, one form of gelu for the other, makes 240.
CLOSE = 100 * torch.finfo(torch.float32).eps
_DRAWS = 12


def _assert_close(name: str, got: Tensor, expected: Tensor) -> None:
    expected = expected.detach()
    torch.testing.assert_close(
        got.detach(), expected, rtol=0, atol=CLOSE * float(expected.abs().max()), msg=lambda text: f"{name}: {text}"
    )


def _assert_bitwise(name: str, got: Tensor, expected: Tensor) -> None:
    compare.assert_bitwise_equal(name, got, expected)


def _assert_same(
    model: nn.Module, other: nn.Module, check: Callable[[str, Tensor, Tensor], None] = _assert_close, **extra: object
) -> None:
    (logits, gradients), (expected, expected_gradients) = run(model, **extra), run(other, **extra)
    check("logits", logits, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        check(name, gradient, expected_gradients[name])


def _pair(*args: object, **options: object) -> tuple[nn.Module, nn.Module, pk.integrations.Report]:
    plain = build(*args, **options)
    fused = copy.deepcopy(plain)
    return fused, plain, pk.apply(fused)


def _adapters(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str, kind: str) -> None:
    fused, plain, report = _pair(architecture, kind)
    assert len(report.fused) == (4 if kind == "double" else 2) and not report.fallbacks
    assert {type(module) for module in _adapters(fused)} == {
        FusedParallelAdapter if kind == "parallel" else FusedAdapter
    }
    _assert_same(fused, plain)
    assert not report.fallback_calls


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    fused, plain, report = _pair("bert", "double", non_linearity=name)
    assert not report.fallbacks
    assert {adapterhub_layers._activation(adapter) for adapter in _adapters(fused)} == {ACTIVATIONS[name]}
    _assert_same(fused, plain)
    assert not report.fallback_calls


@pytest.mark.parametrize(
    "options",
    [
        {"scaling": 0.5},
        {"scaling": 4.0, "kind": "double"},
        {"scaling": 0.25, "kind": "parallel"},
        {"reduction_factor": 0.5},
        {"reduction_factor": 1000},
        {"reduction_factor": {"1": 2, "default": 8}, "kind": "parallel"},
        {"original_ln_before": False},
        {"original_ln_after": False, "residual_before_ln": False},
        {"original_ln_after": False, "kind": "parallel"},
        {"residual_before_ln": False},
        {"residual_before_ln": "post_add"},
        {"adapter_residual_before_ln": True},
        {"init_weights": "mam_adapter"},
        {"init_weights": "houlsby"},
        {"mh_adapter": True, "output_adapter": False, "kind": "parallel"},
        {"leave_out": [0]},
        {"dropout": 0.5},
    ],
    ids=str,
)
def test_options(options: dict[str, object]) -> None:
    fused, plain, report = _pair(**options)
    assert report.fused and not report.fallbacks
    _assert_same(fused, plain)
    assert not report.fallback_calls


SETUPS = {
    "stack": Stack("a", "b"),
    "parallel": Parallel("a", "b"),
    "batch": BatchSplit("a", "b", batch_sizes=[1, 3]),
    "average": Average("a", "b", weights=[0.3, 0.7]),
    "split": Split("a", "b", splits=[3, 4]),
    "fuse": Fuse("a", "b"),
    "fuse in a stack": Stack("c", Fuse("a", "b")),
    "stacks in a fuse": Fuse(Stack("c", "a"), "b"),
    "stack in parallel": Parallel(Stack("a", "c"), "b"),
    "stack in a batch": BatchSplit(Stack("a", "c"), "b", batch_sizes=[3, 1]),
}


class TestComposition:
    @pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
    @pytest.mark.parametrize(("architecture", "kind"), [("bert", "seq"), ("bert", "double"), ("llama", "double")])
    def test_blocks(self, architecture: str, kind: str, setup: object) -> None:
        fused, plain, report = _pair(architecture, kind, "abc", scaling=0.5)
        assert len(report.fused) == 3 * (4 if kind == "double" else 2)
        for model in (fused, plain):
            activate(model, setup)
        _assert_same(fused, plain)
        assert not report.fallback_calls

    @pytest.mark.parametrize("name", [name for name, setup in SETUPS.items() if type(setup) is not Parallel])
    def test_blocks_of_parallel_adapters(self, name: str) -> None:
        fused, plain, report = _pair("bert", "parallel", "abc")
        for model in (fused, plain):
            activate(model, SETUPS[name])
        _assert_same(fused, plain)
        assert not report.fallback_calls

    @pytest.mark.parametrize(("setup", "calls"), [("parallel", 4), ("batch", 4), ("average", 4), ("fuse", 8)])
    def test_up_is_made_for_fuse_alone(self, setup: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
        fused, _, _ = _pair("bert", "seq", "ab")
        activate(fused, SETUPS[setup])
        made = []
        operation = adapterhub_layers.bottleneck_adapter
        monkeypatch.setattr(
            adapterhub_layers, "bottleneck_adapter", lambda *args, **kwargs: made.append(1) or operation(*args, **kwargs)
        )
        run(fused)
        assert len(made) == calls

    @pytest.mark.parametrize("names", ["ab", "ba"])
    @pytest.mark.parametrize("block", [Parallel, lambda *n: BatchSplit(*n, batch_sizes=[2, 2]), Fuse, Average])
    def test_one_of_two_falls_back(self, block: Callable[..., object], names: str) -> None:
        plain = build("bert", "double", "a")
        plain.add_adapter("b", config=adapters.DoubleSeqBnConfig(reduction_factor=8, ln_after=True))
        randomize(plain)
        activate(plain, block(*names))
        fused = copy.deepcopy(plain)
        report = pk.apply(fused)
        assert len(report.fused) == len(report.fallbacks) == 4
        _assert_same(fused, plain)

    @pytest.mark.parametrize("kind", ["seq", "parallel"])
    def test_fusion_attentions(self, kind: str) -> None:
        fused, plain, _ = _pair("bert", kind, "ab")
        for model in (fused, plain):
            activate(model, Fuse("a", "b"))
        got, expected = (
            model(tokens(), output_adapter_fusion_attentions=True).adapter_fusion_attentions["a,b"]
            for model in (fused, plain)
        )
        for layer in expected:
            _assert_close("attentions", *(torch.from_numpy(a[layer]["output_adapter"]) for a in (got, expected)))

    def test_what_adapterhub_refuses_is_refused(self) -> None:
        """Its parallel adapter in its Parallel block: batches of two sizes."""
        for model in _pair("bert", "parallel", "ab")[:2]:
            activate(model, Parallel("a", "b"))
            with pytest.raises(RuntimeError, match="must match the size of tensor b"):
                run(model)


@pytest.mark.parametrize(("kind", "residual"), [("double", "x"), ("seq", "other"), ("parallel", "none")])
def test_residual_of_the_operation(kind: str, residual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where x is the residual it is handed over as such, to be read once."""
    fused, _, _ = _pair("bert", kind)
    seen = set()
    operation = adapterhub_layers.bottleneck_adapter

    def record(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        other = kwargs["residual"]
        seen.add("none" if other is None else "x" if other is x else "other")
        return operation(x, *args, **kwargs)

    monkeypatch.setattr(adapterhub_layers, "bottleneck_adapter", record)
    run(fused)
    assert seen == {residual}


@pytest.mark.parametrize("kind", KINDS)
def test_direct_call(kind: str) -> None:
    """All three results, down and up read after the call, with their gradients."""
    fused, plain, report = _pair("bert", kind, scaling=0.5)
    results = []
    for model in (fused, plain):
        adapter, generator = _adapters(model)[0], torch.Generator().manual_seed(0)
        x, residual = (torch.randn(2, 3, HIDDEN, generator=generator).requires_grad_() for _ in range(2))
        outputs = adapter(x, residual)
        assert len(outputs) == 3
        sum((output * output).sum() for output in outputs).backward()
        results.append([*(1.0 * output for output in outputs), x.grad, adapter.adapter_up.weight.grad])
    for index, (got, expected) in enumerate(zip(*results, strict=True)):
        _assert_close(str(index), got, expected)
    assert not report.fallback_calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """As close to a float64 run as AdapterHub is, by the error budget; errors of a model scatter, so several."""
    draws = []
    for seed in range(_DRAWS):
        plain = build("bert", kind, seed=seed).to(dtype)
        exact, fused = copy.deepcopy(plain).double(), copy.deepcopy(plain)
        report = pk.apply(fused)
        draws.append([run(model)[0] for model in (fused, plain, exact)])
        assert not report.fallback_calls
    compare.assert_close("logits", *(torch.stack(logits) for logits in zip(*draws, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    draws = []
    for seed in range(_DRAWS):
        fused, plain, report = _pair("bert", kind, seed=seed)
        exact = run(copy.deepcopy(plain).double())[0]
        with torch.autocast("cpu", torch.bfloat16):
            (ours, gradients), (theirs, expected) = run(fused), run(plain)
        assert {name: g.dtype for name, g in gradients.items()} == {name: g.dtype for name, g in expected.items()}
        assert not report.fallback_calls
        draws.append([ours, theirs, exact])
    compare.assert_close("logits", *(torch.stack(logits) for logits in zip(*draws, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str) -> None:
    fused, plain, _ = _pair("bert", kind)
    x = torch.randn(2, 3, HIDDEN)
    compiled = torch.compile(_adapters(fused)[0], backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(x, x), _adapters(plain)[0](x, x), strict=True):
        _assert_close("output", got, expected)


class TestFallbacks:
    """Where AdapterHub's forward does something else, it is AdapterHub's forward that runs."""

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"use_gating": True}, "it has a gate"),
            ({"ln_before": True}, "it has a layer norm of its own"),
            ({"ln_after": True}, "it has a layer norm of its own"),
            ({"ln_after": True, "adapter_residual_before_ln": True}, "it has a layer norm of its own"),
            ({"scaling": "learned"}, "its scaling is learned"),
            ({"scaling": "channel"}, "its scaling is learned"),
            (
                {"phm_layer": True, "reduction_factor": 4, "init_weights": "bert"},
                "it is made of PHMLayer, Activation_Function_Class, PHMLayer, Dropout",
            ),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("kind", KINDS)
    def test_configs(self, kind: str, options: dict[str, object], reason: str) -> None:
        plain = build("bert", kind, **options)
        fused = copy.deepcopy(plain)
        with pytest.warns(UserWarning, match="nothing in BertForMaskedLM"):
            report = pk.apply(fused)
        assert not report.fused and set(report.fallbacks.values()) == {reason}
        assert {type(module) for module in _adapters(fused)} == {type(module) for module in _adapters(plain)}
        _assert_same(fused, plain, _assert_bitwise)

    @pytest.mark.parametrize("name", sorted(set(ACT2CLS) - set(ACTIVATIONS)))
    def test_activations(self, name: str) -> None:
        plain = build(non_linearity=name)
        fused = copy.deepcopy(plain)
        with pytest.warns(UserWarning, match="nothing in BertForMaskedLM"):
            report = pk.apply(fused)
        assert all("its activation is " in reason for reason in report.fallbacks.values())
        _assert_same(fused, plain, _assert_bitwise)

    @staticmethod
    def _leaky(adapter: nn.Module) -> None:
        adapter.adapter_down[1].f = nn.LeakyReLU(0.3)

    @staticmethod
    def _parametrized(adapter: nn.Module) -> None:
        nn.utils.parametrizations.weight_norm(adapter.adapter_up)

    @staticmethod
    def _pruned(adapter: nn.Module) -> None:
        torch.manual_seed(0)
        prune.random_unstructured(adapter.adapter_up, "weight", 0.5)

    @staticmethod
    def _alpha_dropout(adapter: nn.Module) -> None:
        adapter.dropout = nn.AlphaDropout(0.5).eval()

    @staticmethod
    def _stochastic_depth(adapter: nn.Module) -> None:
        # Instead of torchvision's, which would be one more package for one class.
        adapter.DropPath = nn.Hardtanh(-0.1, 0.1)

    @staticmethod
    def _no_bias(adapter: nn.Module) -> None:
        adapter.adapter_up.bias = None

    @staticmethod
    def _subclass(adapter: nn.Module) -> None:
        class Doubled(type(adapter)):
            def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
                output, *others = super().forward(*args, **kwargs)
                return 2 * output, *others

        adapter.__class__ = Doubled

    @staticmethod
    def _hook(path: str) -> Callable[[nn.Module], None]:
        def change(adapter: nn.Module) -> None:
            module = adapter.get_submodule(path)
            module.register_forward_hook(lambda module, args, output: None if path == "" else output * 0.5)

        return change

    @staticmethod
    def _pre_hook(adapter: nn.Module) -> None:
        adapter.adapter_down[0].register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))

    @staticmethod
    def _backward_hook(adapter: nn.Module) -> None:
        adapter.adapter_up.register_full_backward_hook(lambda module, grads, outputs: (grads[0] * 0.5,))

    @staticmethod
    def _rebound(adapter: nn.Module) -> None:
        forward = adapter.forward
        adapter.forward = lambda *args, **kwargs: forward(*args, **kwargs)

    CHANGES = [
        ("_leaky", "its activation is LeakyReLU, which has no equivalent"),
        ("_parametrized", "it is made of Linear, Activation_Function_Class, ParametrizedLinear, Dropout"),
        ("_pruned", "there are hooks on it or on its parts"),
        ("_alpha_dropout", "it is made of Linear, Activation_Function_Class, Linear, AlphaDropout"),
        ("_stochastic_depth", "it has stochastic depth"),
        ("_no_bias", "a parameter of it is a NoneType, not a plain tensor"),
        ("_subclass", "it is a Doubled, not AdapterHub's Adapter or ParallelAdapter"),
        ("_hook:", "there are hooks on it or on its parts"),
        ("_hook:adapter_down", "there are hooks on it or on its parts"),
        ("_hook:adapter_down.0", "there are hooks on it or on its parts"),
        ("_hook:adapter_down.1", "there are hooks on it or on its parts"),
        ("_hook:adapter_down.1.f", "there are hooks on it or on its parts"),
        ("_hook:adapter_up", "there are hooks on it or on its parts"),
        ("_hook:dropout", "there are hooks on it or on its parts"),
        ("_pre_hook", "there are hooks on it or on its parts"),
        ("_backward_hook", "there are hooks on it or on its parts"),
        ("_rebound", "there are hooks on it or on its parts"),
    ]

    @pytest.mark.parametrize(("change", "reason"), CHANGES)
    @pytest.mark.parametrize("kind", ["double", "parallel"])
    def test_changed_adapters(self, kind: str, change: str, reason: str) -> None:
        """What is done to an adapter by hand, before apply and after it."""
        name, _, path = change.partition(":")
        apply_change = self._hook(path) if name == "_hook" else getattr(self, name)
        plain, before, after = (build("bert", kind) for _ in range(3))
        pk.apply(after)
        for model in (plain, before, after):
            for adapter in _adapters(model):
                apply_change(adapter)
        with pytest.warns(UserWarning, match="nothing in BertForMaskedLM"):
            assert set(pk.apply(before).fallbacks.values()) == {reason}
        _assert_same(before, plain, _assert_bitwise)
        if name != "_subclass":
            _assert_same(after, plain, _assert_bitwise)

    def test_reason_is_counted_for_what_came_after_apply(self) -> None:
        fused, _, report = _pair("bert", "double")
        self._pre_hook(_adapters(fused)[0])
        run(fused)
        assert dict(report.fallback_calls) == {"there are hooks on it or on its parts": 1}

    @pytest.mark.parametrize("kind", ["double", "parallel"])
    def test_dropout_in_training(self, kind: str) -> None:
        fused, plain, report = _pair("bert", kind, dropout=0.5)
        results = []
        for model in (fused, plain):
            model.train()
            torch.manual_seed(3)
            results.append(run(model))
        _assert_bitwise("logits", results[0][0], results[1][0])
        for name, gradient in results[0][1].items():
            _assert_bitwise(name, gradient, results[1][1][name])
        assert set(report.fallback_calls) == {"its dropout is active"}

    @pytest.mark.parametrize("kind", ["seq", "parallel"])
    def test_gating_scores(self, kind: str) -> None:
        fused, plain, report = _pair("bert", kind)
        got, expected = (
            model(tokens(), output_adapter_gating_scores=True).adapter_gating_scores["a"] for model in (fused, plain)
        )
        for layer in expected:
            scores = (torch.from_numpy(scores[layer]["output_adapter"]) for scores in (got, expected))
            _assert_bitwise("scores", *scores)
        assert set(report.fallback_calls) == {"the call asks for gating scores"}

    CALLS = {
        "residual of less": (lambda x: (x, x.bfloat16()), "x is torch.float32, the residual torch.bfloat16"),
        "residual of more": (lambda x: (x, x.double()), "x is torch.float32, the residual torch.float64"),
        "residual of another shape": (lambda x: (x, x[:1]), r"the residual \(1, 3, 32\), the adapter 32 wide"),
        "no residual": (lambda x: (x, None), "the residual is a NoneType"),
        "x of more": (lambda x: (x.double(), x), "x is torch.float64, its parameters are torch.float32"),
        "x of another width": (lambda x: (x[..., :5], x), r"x is \(2, 3, 5\)"),
        "x elsewhere": (lambda x: (x.to("meta"), x.to("meta")), "its tensors are on several devices"),
    }

    @pytest.mark.parametrize("call", CALLS)
    def test_calls(self, call: str) -> None:
        """AdapterHub's result, or AdapterHub's error."""
        fused, plain, report = _pair("bert", "double")
        arguments, reason = self.CALLS[call]
        results = []
        for model in (fused, plain):
            torch.manual_seed(0)
            try:
                results.append(_adapters(model)[0](*arguments(torch.randn(2, 3, HIDDEN))))
            except (RuntimeError, TypeError) as error:
                results.append(error)
        (counted,) = report.fallback_calls
        assert __import__("re").search(reason, counted), counted
        if isinstance(results[1], Exception):
            assert (type(results[0]), str(results[0])) == (type(results[1]), str(results[1]))
        else:
            for got, expected in zip(*results, strict=True):
                _assert_bitwise("output", got, expected)

    def test_device_without_autocast(self) -> None:
        fused, _, report = _pair("bert", "double")
        adapter = _adapters(fused)[0].to("meta")
        x = torch.empty(2, 3, HIDDEN, device="meta")
        assert adapter(x, x)[0].shape == x.shape
        assert set(report.fallback_calls) == {"x is on meta"}

    def test_autocast_stays_out_of_float64(self) -> None:
        fused, plain, report = _pair("bert", "double")
        x = torch.randn(2, 3, HIDDEN)
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = (_adapters(model)[0](x, x.double())[0] for model in (fused, plain))
        _assert_bitwise("output", got, expected)
        assert report.fallback_calls

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (adapters.LoRAConfig(), "it is AdapterHub's LoRALinearTorch, not a bottleneck"),
            (adapters.PrefixTuningConfig(), "it is AdapterHub's PrefixTuningLayer, not a bottleneck"),
            (adapters.PromptTuningConfig(), "it is AdapterHub's PromptTuningLayer, not a bottleneck"),
            (adapters.LoReftConfig(), "it is AdapterHub's ReftLayer, not a bottleneck"),
            (adapters.SeqBnInvConfig(), "it is AdapterHub's NICECouplingBlock, not a bottleneck"),
        ],
        ids=lambda value: value if isinstance(value, str) else type(value).__name__,
    )
    def test_other_methods_are_reported(self, config: object, reason: str) -> None:
        fused, plain, _ = _pair()
        for model in (fused, plain):
            torch.manual_seed(1)
            model.add_adapter("other", config=config)
            model.set_active_adapters(Stack("other", "a"))
        report = pk.apply(fused)
        assert set(report.fallbacks.values()) == {reason}
        _assert_same(fused, plain)


class TestApply:
    def test_is_idempotent(self) -> None:
        fused, plain, first = _pair()
        assert pk.apply(fused) == first
        _assert_same(fused, plain)

    @pytest.mark.parametrize("kind", KINDS)
    def test_revert_leaves_no_trace(self, kind: str) -> None:
        model = build("bert", kind)
        before = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = run(model)[0]
        pk.apply(model)
        run(model)
        pk.revert(model)
        assert {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()} == before
        for name, tensor in model.state_dict().items():
            _assert_bitwise(name, tensor, state[name])
        _assert_bitwise("logits", run(model)[0], expected)

    def test_strict_changes_nothing(self) -> None:
        model = build("bert", "seq", "a")
        model.add_adapter("b", config=adapters.SeqBnConfig(ln_after=True))
        with pytest.raises(pk.UnsupportedError, match=r"(?s)strict, and not everything.*2 not fused: it has a layer norm"):
            pk.apply(model, strict=True)
        assert {type(module) for module in _adapters(model)} == {Adapter}
        assert len(pk.apply(build("bert", "parallel"), strict=True).fused) == 2

    def test_without_adapters_nothing_is_done(self) -> None:
        with pytest.warns(UserWarning, match="nothing in BertForMaskedLM was put on these kernels"):
            assert pk.apply(base()).fused == ()

    def test_report_prints(self) -> None:
        fused, _, report = _pair(dropout=0.5)
        run(fused.train())
        assert str(report).splitlines() == [
            "peft_kernels: 2 modules fused, 0 not",
            "  2 calls fell back: its dropout is active",
        ]

    def test_hook_wrapper_that_came_after(self) -> None:
        """accelerate keeps the bound method in ``_old_forward``."""
        fused, plain, _ = _pair()
        for adapter in _adapters(fused):
            adapter._old_forward = adapter.forward
            adapter.forward = lambda *args, adapter=adapter, **kwargs: adapter._old_forward(*args, **kwargs)
        _assert_same(fused, plain)
        pk.revert(fused)
        _assert_same(fused, plain, _assert_bitwise)


class TestAdapterHubFeatures:
    @pytest.mark.parametrize("setup", [None, "a"])
    def test_disabled_adapters(self, setup: str | None) -> None:
        fused, plain, _ = _pair("bert", "double")
        for model in (fused, plain):
            model.set_active_adapters(None)
        (got, _), (expected, _) = run(fused), run(plain)
        _assert_bitwise("logits", got, expected)
        _assert_bitwise("logits", got, base()(tokens()).logits.detach())
        with adapters.AdapterSetup(setup):
            _assert_same(fused, plain)

    @pytest.mark.parametrize("kind", KINDS)
    def test_training(self, kind: str) -> None:
        fused, plain, report = _pair("bert", kind, "ab", scaling=0.5)
        histories = []
        for model in (fused, plain):
            model.train_adapter("b")
            model.train()
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
            losses = []
            for step in range(3):
                ids = tokens(seed=step)
                optimizer.zero_grad()
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            histories.append([torch.stack(losses), *(p.detach() for p in model.parameters())])
        assert histories[0][0][2] < histories[0][0][0]
        for index, (got, expected) in enumerate(zip(*histories, strict=True)):
            _assert_close(str(index), got, expected)
        assert not report.fallback_calls

    @pytest.mark.parametrize("safe", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_save_and_load(self, kind: str, safe: bool, tmp_path: Path) -> None:
        """Both ways between a model that was applied to and one that was not."""
        fused, plain, _ = _pair("bert", kind, seed=2)
        for model, other in ((fused, plain), (plain, fused)):
            folder = tmp_path / type(_adapters(model)[0]).__name__
            model.save_adapter(str(folder), "a", use_safetensors=safe, with_head=False)
            other.load_adapter(str(folder), load_as="loaded", use_safetensors=safe)
            other.set_active_adapters("loaded")
            pk.apply(other)
            _assert_close("logits", run(other)[0], run(model)[0])
        assert {type(module) for module in _adapters(fused)} == {type(module) for module in _adapters(plain)}

    def test_average_delete_and_add(self) -> None:
        fused, plain, _ = _pair("bert", "double", "a", reduction_factor=4)
        for model in (fused, plain):
            model.add_adapter("b", config=adapters.DoubleSeqBnConfig(reduction_factor=4))
            randomize(model, 1)
            model.average_adapter("c", ["a", "b"], weights=[0.3, 0.7])
            model.delete_adapter("a")
            activate(model, "c")
        _assert_same(fused, plain, _assert_bitwise)
        assert {type(module) for module in _adapters(fused)} == {Adapter}
        assert len(pk.apply(fused).fused) == 8
        _assert_same(fused, plain)

    def test_deepcopy_and_torch_save(self) -> None:
        """Of the adapters' layers: AdapterHub makes the classes of its models while running, which no pickle finds."""
        fused, plain, _ = _pair("bert", "double")
        x = torch.randn(2, 3, HIDDEN)
        for adapter, original in zip(_adapters(fused), _adapters(plain), strict=True):
            buffer = io.BytesIO()
            torch.save(adapter, buffer)
            buffer.seek(0)
            for copied in (copy.deepcopy(adapter), torch.load(buffer, weights_only=False)):
                assert type(copied) is FusedAdapter
                _assert_close("output", copied(x, x)[0], original(x, x)[0])
        _assert_same(copy.deepcopy(fused), plain)

    @pytest.mark.parametrize(("architecture", "kind"), [("bert", "seq"), ("llama", "double"), ("bert", "parallel")])
    def test_gradient_checkpointing(self, architecture: str, kind: str) -> None:
        """The one kind that AdapterHub lets through."""
        fused, _, report = _pair(architecture, kind)
        fused.train()
        expected, expected_gradients = run(fused)
        fused.enable_input_require_grads()
        fused.gradient_checkpointing_enable({"use_reentrant": False})
        assert any(getattr(module, "gradient_checkpointing", False) for module in fused.modules())
        got, gradients = run(fused)
        _assert_bitwise("logits", got, expected)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            _assert_bitwise(name, gradient, expected_gradients[name])
        assert not report.fallback_calls

    def test_layer_of_another_shape_in_parallel_adapter(self) -> None:
        """A parallel adapter's second argument is not read, whatever it is."""
        fused, plain, report = _pair("bert", "parallel")
        x = torch.randn(2, 3, HIDDEN)
        got, expected = (_adapters(model)[0](x, None)[0] for model in (fused, plain))
        _assert_close("output", got, expected)
        assert not report.fallback_calls and isinstance(_adapters(fused)[0], ParallelAdapter)
