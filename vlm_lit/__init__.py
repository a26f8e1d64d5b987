"""Vision-language-model pretraining, in notebooks that stop inside the code they export.

The public names, each loaded with its module when it is first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_MODULES = {
    "core": "peek IGNORE_INDEX IMAGE_TOKEN_INDEX DataError ConfigError",
    "debug.breakpoints": "Breakpoint",
    "debug.label_view": "LabelStrip",
    "text.tokenizer": "load_tokenizer prepare_tokenizer special_tokens",
    "text.templates": "SeparatorStyle Conversation conv_templates render",
    "text.jinja": "to_jinja",
    "text.sentinels": "preprocess_multimodal tokenizer_image_token",
    "text.labels": "preprocess",
    "images": "prepare_image",
    "image_processor": "VLMImageProcessor",
    "processor": "VLMProcessor",
    "data.records": "Records",
    "data.dataset": "LazySupervisedDataset",
    "data.collator": "DataCollatorForSupervisedDataset",
    "data.findings": "AuditSettings",
    "data.audit": "audit",
    "models.config": "VLMConfig",
    "models.mining": "PatchInfoMining",
    "models.vlm": "VLM",
    "weights.presets": "load_preset",
    "weights.build": "build_model",
    "weights.interchange": "load_projector save_projector",
    "weights.saving": "export_model",
    "weights.pretrained": "open_model",
    "training.arguments": "VLMTrainingArguments",
    "training.trainer": "VLMTrainer",
    "training.recipe": "load_recipe",
    "training.run": "train",
    "training.replay": "replay",
    "evaluation.generation": "Chat",
    "evaluation.scoring": "evaluate",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = [*_HOMES, "__version__"]

def __getattr__(name):
    "A public name from its module."
    if name not in _HOMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

def __dir__(): return sorted({*globals(), *__all__})
