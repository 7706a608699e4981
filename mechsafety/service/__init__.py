"""A model behind HTTP: replies, scores, health and metrics. It needs the extra ``serve``, and loads only when asked."""

from mechsafety.errors import MechsafetyError

try:
    from mechsafety.service.app import build_app
    from mechsafety.service.limits import ServiceLimits
    from mechsafety.service.run import bound_socket, read_token, serve
except ModuleNotFoundError as error:
    if error.name not in ("fastapi", "pydantic", "starlette", "prometheus_client", "uvicorn"):
        raise
    raise MechsafetyError(
        f"the service needs the package {error.name}, which is not installed", hint='pip install "mechsafety[serve]"'
    ) from None

__all__ = ["ServiceLimits", "bound_socket", "build_app", "read_token", "serve"]
