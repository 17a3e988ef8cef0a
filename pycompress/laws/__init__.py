"""Compression laws: loss and accuracy as functions of the compression ratio, fitted to a sweep's runs."""

from pycompress.laws.advice import Advice, advise
from pycompress.laws.fitting import fit, fit_methods
from pycompress.laws.law import Coefficient, Estimate, HeldOut, Law

__all__ = ["Advice", "Coefficient", "Estimate", "HeldOut", "Law", "advise", "fit", "fit_methods"]
