"""Makes tests/golden/open_clip_convnext.safetensors: a tiny timm ConvNeXt under open_clip's key
names, an input, and what each stage gives.

    pip install timm --no-deps; python tools/make_open_clip_golden.py

open_clip keeps timm's network under `visual.trunk`. timm imports torchvision, of which a ConvNeXt
uses nothing: stand-ins satisfy the imports.
"""

import enum, importlib.machinery, sys, types
from pathlib import Path
import torch
from safetensors.torch import save_file

class StandIn(types.ModuleType):
    "A module in which every name is an empty class."

    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})

class StandIns:
    "Finds torchvision and whatever is asked for inside it."

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != "torchvision": return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec): return StandIn(spec.name)

    def exec_module(self, module): module.__path__ = []

def import_timm():
    "timm's ConvNeXt, with torchvision if it is there and with stand-ins if not."
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.insert(0, StandIns())
        import torchvision.transforms.functional as functional

        functional.InterpolationMode = enum.Enum(
            "InterpolationMode",
            {
                name.upper(): name
                for name in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
            },
        )
    from timm.models.convnext import ConvNeXt

    return ConvNeXt

def main():
    torch.manual_seed(0)
    trunk = import_timm()(depths=(1, 1, 2, 1), dims=(8, 12, 16, 18), num_classes=4).eval()
    with torch.no_grad():
        # gamma, too: at its 1e-6 the branches would not be heard
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        pictures = torch.randn(2, 3, 32, 32)
        x = None
        maps = {}
        x = trunk.stem(pictures)
        for n, stage in enumerate(trunk.stages):
            x = stage(x)
            maps[f"map.{n}"] = x.contiguous()
    weights = {f"visual.trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
    rest = {
        "visual.head.proj.weight": torch.randn(4, 18),
        "positional_embedding": torch.randn(4, 8),
        "text_projection": torch.randn(8, 8),
        "transformer.resblocks.0.ln_1.weight": torch.ones(8),
        "token_embedding.weight": torch.randn(6, 8),
        "logit_scale": torch.tensor(4.6),
    }
    path = Path(__file__).resolve().parent.parent / "tests/golden/open_clip_convnext.safetensors"
    save_file(
        {**weights, **rest, "input": pictures, **maps},
        path,
        metadata={
            "made by": "tools/make_open_clip_golden.py",
            "timm": __import__("timm").__version__,
        },
    )
    print(path.name, path.stat().st_size, "bytes")

if __name__ == "__main__": main()
