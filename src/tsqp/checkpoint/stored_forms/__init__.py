"""Forms in which the field's tools store quantised matrices in safetensors: how each is found and dequantised.

A row of a table for each ``quant_method``. What a form's values are: docs/models.md.
"""

from tsqp.checkpoint.stored_forms.base import QuantisedMatrix, StoredForm
from tsqp.checkpoint.stored_forms.table import LEGACY_FILE, form_in, stored_form

__all__ = ["LEGACY_FILE", "QuantisedMatrix", "StoredForm", "form_in", "stored_form"]
