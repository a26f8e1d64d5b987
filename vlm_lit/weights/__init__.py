"Models by name, their weights in and out."
from .presets import *
