"""Ship a model: a diffusers folder or a single file, each proven by loading it back before it appears."""

from latentvae.export.diffusers_folder import export_model
from latentvae.export.proof import DTYPES, ExportDtype, ExportError
from latentvae.export.report import ExportReport, SingleFileReport
from latentvae.export.single_file import export_single_file

__all__ = [
    "DTYPES",
    "ExportDtype",
    "ExportError",
    "ExportReport",
    "SingleFileReport",
    "export_model",
    "export_single_file",
]
