"""What an adapter sits on: a layer of the base model, with one interface for every kind of layer."""

from .conv import ConvSite
from .embedding import EmbeddingSite
from .experts import ExpertsSite, MixtureSite
from .linear import LinearSite
from .site import Site, site_of

__all__ = ["ConvSite", "EmbeddingSite", "ExpertsSite", "LinearSite", "MixtureSite", "Site", "site_of"]
