"""From a dense model to a sparse one: the dense model is the teacher of its own conversion, with
the same weights."""

from nsa_fsa.training.teacher import Lesson, Teacher, teach
from nsa_fsa.training.trainer import Teaching, TeachingMixin
from nsa_fsa.training.warm_up import freeze_all_but_new

__all__ = ["Lesson", "Teacher", "Teaching", "TeachingMixin", "freeze_all_but_new", "teach"]
