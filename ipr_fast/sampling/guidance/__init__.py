"""Generation toward a reward, of tokens and images: IterRef, and the methods that it is compared with."""

from ipr_fast.sampling.guidance.best_of import BestOfN
from ipr_fast.sampling.guidance.iterref import IterRef
from ipr_fast.sampling.guidance.steering import Steering
from ipr_fast.sampling.guidance.svdd import SVDD

__all__ = ["SVDD", "BestOfN", "IterRef", "Steering"]
