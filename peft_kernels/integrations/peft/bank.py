"""AdapterBank: many adapters in PEFT's files on one model, each row of a batch with its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peft_kernels.integrations.adapter_files import AdapterFolder
from peft_kernels.integrations.peft import adapter_folder, banked, lora_files
from peft_kernels.integrations.peft.lora_config import read_config
from peft_kernels.integrations.sites import Site, library_class
from peft_kernels.lora.bank import SlotStore
from peft_kernels.lora.slots import NAME, Factors, Shape, SideStream


class AdapterBank:
    """Serve many LoRA adapters at once on one model: which row uses which is said before the batch.

    Semantics: ``bank.use(names); y = model(x)`` gives row i what the model gives with adapter names[i] alone.

    Every added adapter has a copy on the host. ``slots`` of them are *resident*, which is to say in a slot on the
    device; ``use`` loads those of its batch that are not, in the place of those that nobody has used for longest.
    The slots' memory is allocated once: slots * max_rank * (K + N) elements for each layer with in-features K and
    out-features N (``nbytes``).

    While names are in use, they alone count: adapters that PEFT has on the model rest, and its ``disable_adapter()`` is
    heeded. Before the first ``use``, and after ``use(None)``, the model computes what it did without a bank. Dropout is
    never at work.

    A server has one thread that calls ``use`` and then the model, on one stream. ``add`` and ``remove`` may come from
    others: they take a lock, and refuse what the current batch uses.

    Args:
        model: PEFT's, or any with nn.Linear or transformers' Conv1D layers; its layers are swapped in place, until
            ``close``. Their weights are on one device, where the model stays.
        slots: how many adapters a batch may have, and how many stay on the device.
        max_rank: the greatest rank of an adapter in a layer.
        target_modules: names, or a pattern, as PEFT's option of that name; "all-linear" for all but the head. None: the
            layers that are PEFT's, or, where there are none, those of the first adapter that is added.
        dtype: of factors. None: each layer's; half precision then rounds float32 files once. float32 beside half
            precision keeps them exact.
        overlap: whether layers wait for their own factors alone, so that those of later ones are loaded in the
            meantime. A model under ``torch.compile`` on a GPU needs False. Nothing of it concerns a CPU.

    Raises:
        ValueError: an argument is none of these, or a layer's call is not known to be ``F.linear``. The model is as it
            was.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> AdapterBank(model, slots=2, max_rank=4, target_modules=["0"])
        AdapterBank(0 adapters, 0 of 2 slots taken, max_rank=4, 1 layer, 384 bytes on cpu, 0 bytes on the host)
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int = 64,
        max_rank: int = 64,
        *,
        target_modules: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        overlap: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"{NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
        for option, value in (("slots", slots), ("max_rank", max_rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{NAME}: {option} must be an int of at least 1, got {value!r}")
        self.slots, self.max_rank, self._dtype, self._overlap = slots, max_rank, dtype, bool(overlap)
        self._root = banked.base_model(model)
        self._lock, self._is_closed = threading.RLock(), False
        self._store: SlotStore | None = None
        self._layers: dict[str, nn.Module] = {}
        layers = banked.targets_of(self._root, target_modules)
        if layers is not None:
            self._open(layers, self._made(layers))

    def add(self, name: str, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Read an adapter's files and keep it on the host. All is checked before anything is copied or changed.

        Args:
            name: by which ``use`` knows it; another than "__base__".
            folder: a local one with PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, or ``.bin``.
            overwrite: whether an adapter of this name gives way; not while it is in use.

        Raises:
            FileNotFoundError: the folder or a file is missing.
            ValueError: the name is known; or the files are damaged, no plain LoRA (DoRA, trained biases, embeddings,
                ``modules_to_save``), are for other layers than the bank's, or have too great a rank.
        """
        with self._lock:
            self._check_open()
            if self._store is not None:
                self._store.check_name(name, overwrite)
        files = adapter_folder.read(folder, ("LORA",))
        with self._lock:
            self._check_open()
            layers = self._layers if self._store is not None else self._named(files)
            factors = _factors(files, layers)
            store = self._made(layers) if self._store is None else self._store
            store.add(name, factors, overwrite)
            if self._store is None:
                self._open(layers, store)

    def remove(self, name: str) -> None:
        """Forget an adapter, on the host and in its slot.

        Raises:
            KeyError: there is none of this name.
            ValueError: it is in use by the current batch, or by one to which a ``with`` block returns.
        """
        with self._lock:
            self._check_open()
            if self._store is None:
                raise KeyError(f"{NAME}.remove: no adapter {name!r}; none was added")
            self._store.remove(name)

    def use(self, names: Sequence[str] | None) -> Use:
        """Say which adapter each row of the next batches uses, until the next ``use``.

        Where all are resident nothing is copied but the batch's plan, a few numbers for each row. A model's inputs may
        have as many rows as there are names, or a multiple: row i then has name i // multiple, as beams have.

        Args:
            names: of the rows; "__base__" for none. None: there is no batch.

        Returns:
            For a ``with`` block, at whose end the batch of before is used again.

        Raises:
            KeyError: a name is unknown.
            ValueError: ``names`` is no list of names, or names more adapters than there are slots.
        """
        with self._lock:
            self._check_open()
            if self._store is None:
                raise ValueError(f"{NAME}.use: add an adapter before, whose layers get slots")
            before = self._store.in_use
            self._store.use(names)
            return Use(self._store, before)

    def close(self) -> None:
        """Give the model its layers' own classes back, and let go of all adapters."""
        with self._lock:
            for site in self._sites():
                site.restore()
            for layer in self._layers.values():
                vars(layer).pop(banked.SLOTS, None)
            if self._store is not None:
                self._store.close()
            self._store, self._layers, self._is_closed = None, {}, True

    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters, in the order in which they were added."""
        return () if self._store is None else self._store.names

    @property
    def resident(self) -> tuple[str, ...]:
        """Of those that are in a slot, the least recently used first."""
        return () if self._store is None else self._store.resident

    @property
    def nbytes(self) -> int:
        """Of all slots, on the device; 0 while it is not known which layers have some."""
        return 0 if self._store is None else self._store.nbytes

    @property
    def host_nbytes(self) -> int:
        """Of all adapters, on the host."""
        return 0 if self._store is None else self._store.host_nbytes

    def __repr__(self) -> str:
        count = len(self._layers)
        where = "nowhere" if self._store is None else str(self._store.device)
        return (
            f"{NAME}({len(self.names)} adapters, {len(self.resident)} of {self.slots} slots taken, "
            f"max_rank={self.max_rank}, {count} layer{'s' * (count != 1)}, {self.nbytes:,} bytes on {where}, "
            f"{self.host_nbytes:,} bytes on the host)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"{NAME}: a bank is neither copied nor pickled; its adapters are in their folders")

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError(f"{NAME}: the bank was closed")

    def _named(self, files: AdapterFolder) -> dict[str, nn.Module]:
        """The layers of a file, for the first adapter of a model that nothing else says it of."""
        found = banked.candidates(self._root)
        names = lora_files.layer_names(files)
        for name in names:
            if name not in found:
                raise ValueError(
                    f"{NAME}.add: {files.weights_file} has factors of {name!r}, where the model has no linear layer"
                )
        return {name: layer for name, layer in found.items() if name in names}

    def _made(self, layers: Mapping[str, nn.Module]) -> SlotStore:
        """The slots of layers that are not swapped yet."""
        shapes, devices = [], {}
        for name, layer in layers.items():
            banked.check_layer(name, layer)
            weight, _ = banked.weight_and_bias(layer)
            if self._dtype not in (None, torch.float32, weight.dtype):
                raise ValueError(f"{NAME}: dtype must be float32 or {name}'s, {weight.dtype}, got {self._dtype}")
            shapes.append(Shape(name, weight.shape[1], weight.shape[0], self._dtype or weight.dtype))
            devices[weight.device] = name
        if len(devices) > 1:
            raise ValueError(f"{NAME}: layers must be on one device, got {', '.join(map(str, devices))}")
        device = next(iter(devices), torch.device("cpu"))
        side = SideStream(device, len(shapes)) if device.type == "cuda" else None
        return SlotStore(shapes, self.slots, self.max_rank, device, side, self._overlap)

    def _open(self, layers: dict[str, nn.Module], store: SlotStore) -> None:
        """Swap the layers' classes; nothing here may fail."""
        self._store, self._layers = store, layers
        for layer, slots in zip(layers.values(), store.layers, strict=True):
            vars(layer)[banked.SLOTS] = slots
        for site in self._sites():
            site.fuse()

    def _sites(self) -> list[Site]:
        sites = []
        for name, layer in self._layers.items():
            library: Any = library_class(layer)
            sites.append(Site({name: layer}, {library: banked.banked_class(library)}, why_not=lambda: None))
        return sites


class Use:
    """What ``AdapterBank.use`` returns: a ``with`` block, at whose end the batch of before is used again."""

    def __init__(self, store: SlotStore, before: tuple[str, ...] | None) -> None:
        self._store, self._before = store, before

    def __enter__(self) -> None:
        self._store.hold(self._before)

    def __exit__(self, *_: object) -> None:
        self._store.release(self._before)


def _factors(files: AdapterFolder, layers: Mapping[str, nn.Module]) -> dict[int, Factors]:
    """What a file has for layers, by their place among them.

    Raises:
        ValueError: it does not fit.
    """
    config, heads = read_config(files), files.config.get("modules_to_save")
    if heads:
        raise ValueError(f"{adapter_folder.where_of(files)} must not set modules_to_save in a bank, got {heads!r}")
    weights = {name: banked.weight_and_bias(layer)[0] for name, layer in layers.items()}
    sizes = {name: (weight.shape[1], weight.shape[0]) for name, weight in weights.items()}
    found = lora_files.factors_by_layer(files, config, sizes)
    return {index: Factors(*found[name], config.scaling(name)) for index, name in enumerate(layers) if name in found}
