"""What holds where AdapterHub is not installed: its files are read and written, and nobody else is taken for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

import peft_kernels as pk

_PROGRAM = """
import sys
from pathlib import Path

sys.modules["adapters"] = sys.modules["transformers"] = None
import torch
from torch import nn
from peft_kernels import SerialAdapter, insert_adapters
from peft_kernels.integrations.adapterhub import load_adapter, save_adapter

def model(seed):
    torch.manual_seed(seed)
    blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0) for _ in range(3))
    for block in blocks[1:]:
        insert_adapters(block, {"attention": SerialAdapter(8, 3, "tanh", 0.5)})
        nn.init.normal_(block.adapters["attention"].up.weight)
    return nn.ModuleDict({"blocks": blocks})

written, read = model(0), model(1)
folder, locations = Path(sys.argv[1]), {"attention": "somewhere"}
save_adapter(written, folder, "task", locations=locations)
load_adapter(read, folder, locations=locations)
adapters = [name for name, _ in read.named_parameters() if ".adapters." in name]
assert len(adapters) == 8
assert all(torch.equal(read.get_parameter(name), written.get_parameter(name)) for name in adapters)
assert '"leave_out": [\\n      0\\n    ]' in (folder / "adapter_config.json").read_text()
print("equal")
"""


def test_files(tmp_path: Path) -> None:
    program = [sys.executable, "-c", _PROGRAM, str(tmp_path)]
    result = subprocess.run(program, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert result.stdout == "equal\n", result.stderr


def test_another_module_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("adapters.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "adapters", ModuleType("adapters"))
    with pytest.warns(UserWarning, match="nothing in Linear was put on these kernels"):
        assert pk.apply(nn.Linear(2, 2)).fused == ()
