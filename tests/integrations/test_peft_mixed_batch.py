"""``mixed_batch``: training of several adapters in one batch, against each trained alone by PEFT."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft_kernels as pk
from peft_kernels.integrations.peft import row_calls
from peft_kernels.lora.kernels import dropout
from tests.integrations.mixed import (
    ADAPTERS,
    BASE,
    LAST_BITS,
    LENGTH,
    NAMES,
    ROWS,
    assert_close,
    build,
    inputs,
    layer_of,
    tokens,
)
from tests.integrations.models import lora_layers

# Sums over rows and tokens of one adapter, in another order and with other roundings through two layers.
ALONE = 1e-12

Outcome = tuple[Tensor, dict[str, Tensor]]


def pair(*args: Any, **options: Any) -> tuple[Any, Any, pk.integrations.Report]:
    plain = build(*args, **options)
    plain.set_requires_grad(list(ADAPTERS))
    fused = copy.deepcopy(plain).train()
    return fused, plain, pk.apply(fused, strict=True)


def weights(logits: Tensor, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(logits.shape, generator=generator, dtype=torch.float64)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def mixed(model: Any, names: list[str] = NAMES, seed: int = 0) -> Outcome:
    """Logits, and the gradients of a sum over rows; the backward pass runs behind the block."""
    with pk.mixed_batch(model, names):
        logits = model(**inputs(model, len(names), seed=seed)).logits
    (logits * weights(logits)).sum().backward()
    return logits.detach(), gradients(model)


def alone(model: Any, names: list[str] = NAMES, seed: int = 0) -> Outcome:
    """The same by PEFT: each adapter by itself on its own rows."""
    given, found = inputs(model, len(names), seed=seed), {}
    shape = given.get("decoder_input_ids", given["input_ids"]).shape
    logits = torch.empty(*shape, model.config.vocab_size, dtype=torch.float64)
    of_rows = weights(logits)
    for name in dict.fromkeys(names):
        mine = torch.tensor([row for row, each in enumerate(names) if each == name])
        rows = {key: value[mine] for key, value in given.items()}
        if name == BASE:
            with model.disable_adapter(), torch.no_grad():
                logits[mine] = model(**rows).logits
            continue
        model.set_adapter(name)
        own = model(**rows).logits
        (own * of_rows[mine]).sum().backward()
        logits[mine] = own.detach()
        found |= gradients(model)
    return logits, found


def assert_same(got: Outcome, expected: Outcome, bound: float = ALONE) -> None:
    assert_close(got[0], expected[0], bound)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in got[1].items():
        assert_close(gradient, expected[1][name], bound, name)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("names", [NAMES, ["de"] * 3 + [BASE] * 5, [BASE, "ar"]], ids=["all", "one", "two rows"])
def test_each_adapter_as_if_alone(architecture: str, names: list[str]) -> None:
    fused, plain, report = pair(architecture)
    assert_same(mixed(fused, names), alone(plain, names))
    assert not report.fallback_calls


def test_evaluation_is_peft_s_adapter_names() -> None:
    fused, plain, _ = pair()
    with torch.no_grad(), pk.mixed_batch(fused.eval(), NAMES):
        got = fused(tokens()).logits
    assert_close(got, plain(tokens(), adapter_names=NAMES).logits)


def test_generate_within_a_block() -> None:
    fused, plain, _ = pair()
    options = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    with pk.mixed_batch(fused.eval(), NAMES):
        got = fused.generate(input_ids=tokens(), **options)
    assert torch.equal(got, plain.generate(input_ids=tokens(), adapter_names=NAMES, **options))


def test_which_adapters_are_active_does_not_matter() -> None:
    fused, plain, _ = pair()
    fused.set_adapter("ar")
    fused.set_requires_grad(list(ADAPTERS))
    assert_same(mixed(fused), alone(plain))


class TestNoRow:
    """An adapter that no row uses gets no gradient, so that no optimizer touches it."""

    def test_gradients_are_none(self) -> None:
        fused, _, _ = pair()
        _, found = mixed(fused, ["en", BASE, "ar", "ar"])
        assert found and not any(".de." in name for name in found)

    def test_adamw_leaves_it_alone_to_the_bit(self) -> None:
        fused, _, _ = pair()
        before = {name: p.detach().clone() for name, p in fused.named_parameters()}
        optimizer = torch.optim.AdamW([p for p in fused.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
        for names in (["en", BASE, "ar", "ar"], ["ar", "en", "ar", "en"]):
            with pk.mixed_batch(fused, names):
                logits = fused(tokens(4)).logits
            logits.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, p in fused.named_parameters():
            is_used = ".en." in name or ".ar." in name
            assert torch.equal(p, before[name]) != is_used, name


def _masks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that are drawn, in order."""
    drawn: list[int] = []
    draw = dropout.draw_seed

    def noted(device: torch.device) -> Tensor:
        seed = draw(device)
        drawn.append(int(seed))
        return seed

    monkeypatch.setattr(dropout, "draw_seed", noted)
    return drawn


class TestDropout:
    def test_each_adapter_with_its_own_p(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Against autograd with the masks taken out: en drops 0.4, de 0.2, ar nothing."""
        fused, _, report = pair(p=0.4)
        drawn = _masks(monkeypatch)
        layer = layer_of(fused)
        x = torch.randn(ROWS, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        with pk.mixed_batch(fused, NAMES):
            y = layer(x)
        (y * weights(y)).sum().backward()
        got = {"x": x.grad, **gradients(fused)}
        x.grad = None
        (seed,) = drawn
        expected = layer.base_layer(x)
        for name in ADAPTERS:
            p, mine = {"en": 0.4, "de": 0.2, "ar": 0.0}[name], torch.tensor([each == name for each in NAMES])
            kept = x
            if p:
                mask = pk.lora_linear_dropout_mask(seed, ROWS * 3, 32, p).view(x.shape)
                limit = round(p * 65536)
                kept = x * mask * (65536 / (65536 - limit))
            update = layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](kept))
            expected = expected + torch.where(mine[:, None, None], update, 0.0)
        assert_close(y, expected)
        (expected * weights(y)).sum().backward()
        theirs = {"x": x.grad, **gradients(fused)}
        assert got.keys() == theirs.keys() and not report.fallback_calls
        for name, gradient in got.items():
            assert_close(gradient, theirs[name], ALONE, name)

    def test_it_is_off_in_evaluation(self) -> None:
        fused, plain, _ = pair(p=0.4)
        fused.eval()
        assert_same(mixed(fused), alone(plain))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_repeats_the_masks(self, reentrant: bool) -> None:
        fused, _, _ = pair(p=0.4)
        fused.enable_input_require_grads()
        torch.manual_seed(9)
        expected = mixed(fused)
        fused.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(9)
        assert_same(mixed(fused), expected)


class TestCheckpointing:
    """Calls are repeated with the batch that they had, behind its block and between those of other batches."""

    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_two_batches_before_either_backward(self, architecture: str, reentrant: bool) -> None:
        fused, plain, report = pair(architecture)
        fused.enable_input_require_grads()
        fused.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        others = [*NAMES[3:], *NAMES[:3]]
        found = []
        for seed, names in enumerate((NAMES, others)):
            with pk.mixed_batch(fused, names):
                found.append(fused(**inputs(fused, seed=seed)).logits)
        for seed, (logits, names) in enumerate(zip(found, (NAMES, others), strict=True)):
            # Another batch's block is open, and the last one to be forwarded was the other.
            with pk.mixed_batch(fused, ["ar"] * ROWS):
                (logits * weights(logits)).sum().backward()
            assert_same((logits.detach(), gradients(fused)), alone(plain, names, seed))
        assert not report.fallback_calls

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_torch_s_wrapper(self, reentrant: bool) -> None:
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper

        fused, plain, _ = pair()
        fused.enable_input_require_grads()
        fused.config.use_cache = False  # a repeated layer would write to the cache again
        how = wrapper.CheckpointImpl.REENTRANT if reentrant else wrapper.CheckpointImpl.NO_REENTRANT
        stack = fused.base_model.model.model.layers
        for index, layer in enumerate(stack):
            stack[index] = wrapper.checkpoint_wrapper(layer, checkpoint_impl=how)
        logits, found = mixed(fused)
        found = {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in found.items()}
        assert_same((logits, found), alone(plain))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_own_calls_are_bound(self, reentrant: bool) -> None:
        fused, _, _ = pair()
        layer = layer_of(fused)
        x = torch.randn(ROWS, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        found = []
        for how in ("checkpointed", "plain"):
            with pk.mixed_batch(fused, NAMES) as batch:
                y = checkpoint(batch.bound(layer), x, use_reentrant=reentrant) if how == "checkpointed" else layer(x)
            y.square().sum().backward()
            found.append((y.detach(), {"x": x.grad, **gradients(fused)}))
            x.grad = None
        assert len(found[0][1]) == 7
        # Reentrance makes y without a graph, by other products of the same numbers.
        assert_same(*found, bound=LAST_BITS)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_own_calls_that_are_not_bound_are_an_error(self, reentrant: bool) -> None:
        fused, _, _ = pair()
        layer = layer_of(fused)
        x = torch.zeros(ROWS, 3, 32, dtype=torch.float64, requires_grad=True)
        with pk.mixed_batch(fused, NAMES) as batch:
            with pytest.raises(pk.UnsupportedError, match=r"batch.bound"):
                checkpoint(layer, x, use_reentrant=reentrant)
            # Bound within one that is not, and the other way round.
            inside = functools.partial(checkpoint, batch.bound(layer), use_reentrant=reentrant)
            checkpoint(batch.bound(inside), x, use_reentrant=reentrant)
            with pytest.raises(pk.UnsupportedError, match=r"batch.bound"):
                checkpoint(batch.bound(lambda x: checkpoint(layer, x, use_reentrant=reentrant)), x, use_reentrant=True)

    def test_switched_on_within_the_block_is_an_error(self) -> None:
        fused, _, _ = pair()
        with pk.mixed_batch(fused, NAMES):
            fused.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
            with pytest.raises(pk.UnsupportedError, match="before the block"):
                fused(tokens())

    def test_without_a_batch_all_is_as_it_was(self) -> None:
        fused, plain, _ = pair()
        for model in (fused, plain):
            model.train().base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        mixed(fused)
        for model in (fused, plain):
            model(tokens()).logits.square().sum().backward()
        found, expected = gradients(fused), gradients(plain)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert_close(gradient, expected[name], ALONE, name)

    def test_revert_and_pickling_leave_nothing(self) -> None:
        fused, _, _ = pair()
        fused.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        holders = [module for module in fused.modules() if "_gradient_checkpointing_func" in vars(module)]
        before = [module._gradient_checkpointing_func for module in holders]
        mixed(fused)
        assert all(
            module._gradient_checkpointing_func is not each for module, each in zip(holders, before, strict=True)
        )
        assert b"peft_kernels" not in pickle.dumps(fused.base_model.model.model.layers[0])
        mixed(copy.deepcopy(fused))
        pk.revert(fused)
        assert all(module._gradient_checkpointing_func is each for module, each in zip(holders, before, strict=True))


@pytest.mark.parametrize("group", [True, [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]])
def test_groups(group: Any) -> None:
    plain = build(p=0.0)
    plain.set_requires_grad(list(ADAPTERS))
    fused = copy.deepcopy(plain).train()
    report = pk.apply(fused, group=True) if group is True else pk.apply(fused, groups=group)
    for _ in range(2):
        fused(tokens()).logits.sum().backward()
        fused.zero_grad(set_to_none=True)
        assert_same(mixed(fused), alone(plain))
    assert len(report.groups) == 4 and not report.dissolved and not report.fallback_calls


class TestBatch:
    def test_rows_give_each_adapter_its_own_mean(self) -> None:
        """As if each adapter were trained by itself on the mean of its own tokens."""
        fused, plain, _ = pair()
        mask = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.7
        with pk.mixed_batch(fused, NAMES) as batch:
            loss = fused(tokens()).logits.square().sum(-1)
            rows = batch.rows(LENGTH)
        assert rows.names == batch.adapters == tuple(sorted(ADAPTERS)) and batch.names == tuple(NAMES)
        means = rows.mean(loss, mask)
        means.sum().backward()
        found = gradients(fused)
        for name, mean in zip(rows.names, means, strict=True):
            mine = torch.tensor([each == name for each in NAMES])
            plain.set_adapter(name)
            expected = plain(tokens()[mine]).logits.square().sum(-1)[mask[mine]].mean()
            expected.backward()
            assert_close(mean, expected, ALONE)
            for key, gradient in gradients(plain).items():
                assert_close(found.pop(key), gradient, ALONE, key)
        assert not found

    def test_rows_without_a_length(self) -> None:
        fused, _, _ = pair()
        with pk.mixed_batch(fused, ["ar", BASE, "de"]) as batch:
            assert batch.rows().slot.tolist() == [0, -1, 1]

    def test_blocks_nest_and_end(self) -> None:
        fused, plain, _ = pair()
        with torch.no_grad():
            with pk.mixed_batch(fused, NAMES):
                with pk.mixed_batch(fused, ["ar"] * ROWS):
                    inner = fused(tokens()).logits
                outer = fused(tokens()).logits
            with pytest.raises(RuntimeError, match="out"), pk.mixed_batch(fused, NAMES):
                raise RuntimeError("out")
            after = fused(tokens()).logits
            assert_close(inner, plain(tokens(), adapter_names=["ar"] * ROWS).logits)
            assert_close(outer, plain(tokens(), adapter_names=NAMES).logits)
            assert_close(after, plain(tokens()).logits)

    def test_another_model_in_the_block(self) -> None:
        """Such as the reference of a policy: the block is of one model."""
        fused, plain, _ = pair()
        reference = copy.deepcopy(fused)
        with torch.no_grad(), pk.mixed_batch(fused, NAMES):
            assert_close(reference(tokens(3)).logits, plain(tokens(3)).logits)

    def test_disabled_adapters(self) -> None:
        fused, plain, _ = pair()
        with torch.no_grad(), pk.mixed_batch(fused, NAMES), fused.disable_adapter(), plain.disable_adapter():
            assert_close(fused(tokens()).logits, plain(tokens()).logits)

    def test_what_is_not_fused_runs_peft_s_loop(self) -> None:
        fused, plain, report = pair()
        for model in (fused, plain):
            torch.manual_seed(3)
            options = {"target_modules": ["q_proj"], "init_lora_weights": False, "lora_bias": True}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.add_adapter("biased", peft.LoraConfig(r=2, **options))
            model.double().set_requires_grad([*ADAPTERS, "biased"])
        names = ["biased", *NAMES[1:]]
        assert_same(mixed(fused, names), alone(plain, names))
        assert report.fallback_calls == {"an adapter that rows choose has a bias (lora_bias)": 2}


class TestWrongInput:
    def test_an_unknown_name(self) -> None:
        fused, _, _ = pair()
        message = "no adapter 'nobody'; known are 'ar', 'de', 'en' and '__base__'"
        with pytest.raises(KeyError, match=message), pk.mixed_batch(fused, ["nobody", "en"]):
            pass

    def test_another_number_of_rows(self) -> None:
        fused, _, _ = pair()
        with pk.mixed_batch(fused, NAMES[1:]), pytest.raises(ValueError, match="got 7 and 8"):
            fused(tokens())

    def test_names_that_are_none(self) -> None:
        fused, _, _ = pair()
        for names in ("en", [1, 2], None):
            with pytest.raises(ValueError, match="names must be a list"), pk.mixed_batch(fused, names):
                pass

    def test_not_applied(self) -> None:
        _, plain, _ = pair()
        with pytest.raises(ValueError, match=r"call peft_kernels\.apply first"), pk.mixed_batch(plain, NAMES):
            pass
        with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module"), pk.mixed_batch([], NAMES):
            pass

    @pytest.mark.parametrize("options", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
    def test_modules_that_are_not_on_these_kernels(self, options: dict[str, Any]) -> None:
        fused, _, _ = pair()
        fused.add_adapter("more", peft.LoraConfig(r=2, **{"target_modules": ["q_proj"], **options}))
        names = ["more", *NAMES[1:]]
        with pytest.raises(pk.UnsupportedError, match="1 modules of these or of"), pk.mixed_batch(fused, names):
            pass
        with pk.mixed_batch(fused, NAMES):  # no row uses it, and it is not active
            fused(tokens())
        fused.set_adapter("more")
        with pytest.raises(pk.UnsupportedError, match="or of active"), pk.mixed_batch(fused, NAMES):
            pass

    def test_data_parallel(self) -> None:
        fused, _, _ = pair()
        with pytest.raises(pk.UnsupportedError, match="DataParallel"), pk.mixed_batch(nn.DataParallel(fused), NAMES):
            pass

    def test_adapter_names_in_the_block(self) -> None:
        fused, _, _ = pair()
        with pk.mixed_batch(fused.eval(), NAMES), pytest.raises(ValueError, match="adapter_names of its own"):
            fused(tokens(), adapter_names=NAMES)

    def test_merged(self) -> None:
        fused, _, _ = pair()
        fused.merge_adapter()
        with pk.mixed_batch(fused, NAMES), pytest.raises(ValueError, match="merged adapters"):
            fused(tokens())


class TestFrozen:
    def test_an_adapter_that_does_not_train_is_a_warning_once(self) -> None:
        fused, _, _ = pair()
        fused.set_adapter("en")  # PEFT freezes the others
        with pytest.warns(UserWarning) as caught, pk.mixed_batch(fused, NAMES):
            pass
        assert [str(each.message).partition(",")[0] for each in caught] == [
            f"mixed_batch: no parameter of adapter {name!r} requires grad" for name in ("ar", "de")
        ]
        assert Path(caught[0].filename) == Path(__file__)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, found = mixed(fused)
        assert found and all(".en." in name for name in found)

    def test_evaluation_says_nothing(self) -> None:
        fused, _, _ = pair()
        fused.set_adapter("en")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with torch.no_grad(), pk.mixed_batch(fused, NAMES):
                pass
            with pk.mixed_batch(fused.eval(), NAMES):
                pass


def test_threads() -> None:
    """Each thread has a block of its own on one model."""
    fused, plain, _ = pair()
    orders = [NAMES[shift:] + NAMES[:shift] for shift in range(3)]
    with torch.no_grad():
        expected = [plain(tokens(), adapter_names=names).logits for names in orders]
        without = plain(tokens()).logits
    errors: list[str] = []
    started = threading.Barrier(4)

    def work(index: int) -> None:
        started.wait()
        for _ in range(5):
            with torch.no_grad():
                if index == 3:
                    got, right = fused(tokens()).logits, without
                else:
                    with pk.mixed_batch(fused, orders[index]):
                        got, right = fused(tokens()).logits, expected[index]
            if not (got - right).norm() <= 1e-14 * right.norm():
                errors.append(f"thread {index}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not errors


class TestAlora:
    @staticmethod
    def _pair() -> tuple[Any, Any]:
        from tests.integrations import test_peft_alora

        fused, plain, _ = test_peft_alora.pair()
        return fused, plain

    def test_offsets(self) -> None:
        from tests.integrations import test_peft_alora

        fused, plain = self._pair()
        names = ["default", "plain", "default", BASE, "other"]
        ids = test_peft_alora.tokens()
        offsets = test_peft_alora.calculate_alora_offsets(plain.peft_config, "default", ids, adapter_names=names)
        found = []
        with pk.mixed_batch(fused, names, alora_offsets=offsets):
            logits = fused(ids).logits
        logits.square().sum().backward()
        found.append((logits.detach(), gradients(fused)))
        plain.eval()
        logits = plain(ids, adapter_names=names).logits
        logits.square().sum().backward()
        found.append((logits.detach(), gradients(plain)))
        assert_same(*found)

    def test_without_offsets(self) -> None:
        fused, _ = self._pair()
        with pytest.raises(ValueError, match="need alora_offsets"), pk.mixed_batch(fused, ["default", "plain"]):
            pass
        with pk.mixed_batch(fused, ["plain", BASE]):
            pass
        block = pk.mixed_batch(fused, ["default", "plain"], alora_offsets=[1])
        with pytest.raises(ValueError, match="one for each name, got 1 and 2"), block:
            pass


def test_every_layer_is_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _, _ = pair()
    counts: list[int] = []
    run: Callable[..., Any] = row_calls.rows_call
    monkeypatch.setattr(row_calls, "rows_call", lambda *args: (counts.append(1), run(*args))[1])
    mixed(fused)
    assert len(counts) == len(lora_layers(fused))
