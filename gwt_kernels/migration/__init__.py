"""Convert states and checkpoints of other optimizers, levels, rules and dtypes to load into this package's."""

from gwt_kernels.migration.records import Migrated
from gwt_kernels.migration.states import Migration, migrate

__all__ = ["Migrated", "Migration", "migrate"]
