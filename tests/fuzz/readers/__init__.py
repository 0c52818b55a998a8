"""Every reader of the package, by name."""

from tests.fuzz.case import Reader
from tests.fuzz.readers import commands, data, models, runs, settings

READERS: dict[str, Reader] = {**models.READERS, **runs.READERS, **data.READERS, **settings.READERS, **commands.READERS}
