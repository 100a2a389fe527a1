"""Version v1alpha1 of the API: LLMService, BatchProfile, GPUPack."""

from tightship.api.v1alpha1.batchprofile import BatchProfile, ProfileKey
from tightship.api.v1alpha1.gpupack import GPUPack
from tightship.api.v1alpha1.llmservice import LLMService

__all__ = ["BatchProfile", "GPUPack", "LLMService", "ProfileKey"]
