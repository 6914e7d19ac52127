"""From a dense model to a sparse one: the dense model is the teacher of its own conversion, with
the same weights."""

from nsa_fsa.training.schedule import Learned, Schedule, Teaching, learn, parameter_groups
from nsa_fsa.training.teacher import Lesson, Teacher, teach
from nsa_fsa.training.trainer import ConversionMixin, TeachingMixin
from nsa_fsa.training.warm_up import freeze_all_but_new, new_parameters

__all__ = [
    "ConversionMixin",
    "Learned",
    "Lesson",
    "Schedule",
    "Teacher",
    "Teaching",
    "TeachingMixin",
    "freeze_all_but_new",
    "learn",
    "new_parameters",
    "parameter_groups",
    "teach",
]
