"""Run a command as a lesser x86 machine would run it, to see on this machine what fails there.

    python tests/as_machine.py avx2      -- python -m pytest -q    no AVX-512, no bfloat16
    python tests/as_machine.py avx512    -- python -m pytest -q    AVX-512, no bfloat16
    python tests/as_machine.py bf16      -- python -m pytest -q    AVX512-BF16, no AMX
    python tests/as_machine.py no-onednn -- python -m pytest -q    no oneDNN
    python tests/as_machine.py one-core  -- python -m pytest -q    one thread

ATen, oneDNN and MKL read environment variables that forbid them some instructions. What PyTorch
says of the processor, and the operators that a processor may refuse, are replaced right after
`import torch`: in the command, and in every Python process that the command starts. A module
`sitecustomize`, to which PYTHONPATH leads, does this; a Python that is started with -I, -E or -S
does not import it. A machine can only be made lesser: where there is no AVX-512, avx512 is avx2.
The speed is that of the lesser machine as far as it depends on instructions."""

import importlib.abc
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

VARIABLES = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "no-onednn": {},
    "one-core": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
}
ABSENT = {  # functions of `torch.cpu` that shall return False
    "avx2": ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    "avx512": ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    "bf16": ("_is_amx_tile_supported",),
}
LINEAR = ("_linear_pointwise", "_reorder_linear_weight")  # of torch.ops.mkldnn


def hold_back(torch, kind):
    """Change a PyTorch that was just imported: it answers as it does on a machine of that kind."""
    for name in ABSENT.get(kind, ()):
        setattr(torch.cpu, name, lambda: False)
    if kind == "avx2":
        packets, call = (
            [getattr(torch.ops.mkldnn, name) for name in LINEAR],
            torch._ops.OpOverloadPacket.__call__,
        )

        def refuse(self, *given, **options):
            dtypes = {getattr(x, "dtype", None) for x in given}
            if any(self is packet for packet in packets) and torch.bfloat16 in dtypes:
                raise RuntimeError(
                    "bf16 path needs the cpu support avx512bw, avx512vl and avx512dq"
                )
            return call(self, *given, **options)

        torch._ops.OpOverloadPacket.__call__ = refuse
    if kind == "no-onednn":
        torch._C._has_mkldnn = torch.backends.mkldnn.enabled = False
        torch.backends.mkldnn.is_available = lambda: False
        space = torch._ops._OpNamespace
        # __getattribute__ finds the operators that were asked for before, __getattr__ all others
        for method in ("__getattr__", "__getattribute__"):
            setattr(space, method, hiding(getattr(space, method)))


def hiding(look_up):
    """A look-up of operators in which PyTorch itself finds all of them, and any other module finds
    no linear layer of oneDNN."""

    def find(self, name):
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if (
            name in LINEAR
            and self.__dict__.get("name") == "mkldnn"
            and asking.split(".")[0] != "torch"
        ):
            raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute {name!r}")
        return look_up(self, name)

    return find


class Finder(importlib.abc.MetaPathFinder):
    """Finds torch where Python finds it, and calls `hold_back` once torch is loaded."""

    def __init__(self, kind):
        self.kind = kind

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_hold_back(module):
            load(module)
            hold_back(module, self.kind)

        spec.loader.exec_module = load_and_hold_back
        return spec


def main():
    kind, *command = sys.argv[1:] or [""]
    if kind not in VARIABLES or command[:1] != ["--"] or len(command) < 2:
        usage = (
            f"type python tests/as_machine.py KIND -- COMMAND, KIND one of {', '.join(VARIABLES)}"
        )
        print(f"as_machine.py: {usage}", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as site:
        here = str(Path(__file__).resolve().parent)
        Path(site, "sitecustomize.py").write_text(
            f"import sys\nsys.path.append({here!r})\nimport as_machine\n"
            f"sys.meta_path.insert(0, as_machine.Finder({kind!r}))\nsys.path.remove({here!r})\n"
        )
        paths = [site, *filter(None, [os.environ.get("PYTHONPATH")])]
        sys.exit(
            subprocess.call(
                command[1:],
                env=os.environ | VARIABLES[kind] | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        )


if __name__ == "__main__":
    main()
