"""Loading models: what is whole, causal and computed rightly comes back, the rest is refused.

Names are imported when they are first used: plain models load without TransformerLens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
