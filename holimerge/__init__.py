"""holimerge: training-free token merging for Hugging Face video LLMs.

    model = holimerge.patch_model(model, "holimerge-15")

Importing it changes nothing; `patch_model` changes the one model it is given.
"""

from .api import last_report, merging, patch_model, unpatch_model
from .config import Config, ConfigError, load_config
from .graphs import graphed
from .registry import list_families, list_methods, list_presets
from .report import Report, Selection, VideoReport
from .scoring import score_options

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "Report",
    "Selection",
    "VideoReport",
    "__version__",
    "graphed",
    "last_report",
    "list_families",
    "list_methods",
    "list_presets",
    "load_config",
    "merging",
    "patch_model",
    "score_options",
    "unpatch_model",
]
