from .peaks import KNOWN_PEAKS, peak_flops
from .walk import walk
from .work import Call, Count, Work
