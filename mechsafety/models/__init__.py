"""Models: loading, the wrapper, its checks, the forward engine, and the embedded demo model."""

from mechsafety.models.decode import ReplyToken
from mechsafety.models.lens_model import LensModel
from mechsafety.models.load import load_model

__all__ = ["LensModel", "ReplyToken", "load_model"]
