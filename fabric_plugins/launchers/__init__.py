"""Launchers: how processes start."""

from typing import TYPE_CHECKING

from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_plugins.launchers.elastic import ElasticLauncher

__all__ = ["ElasticLauncher"]

__getattr__, __dir__ = lazy(__name__, {"ElasticLauncher": "elastic"})
