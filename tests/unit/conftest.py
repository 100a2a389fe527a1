"""Property tests get no deadline: on a shared machine a slow example tells nothing about the code."""

from hypothesis import settings

settings.register_profile("tightship", deadline=None)
settings.load_profile("tightship")
