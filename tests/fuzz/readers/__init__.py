"""Every reader of the package, by name."""

from tests.fuzz.case import Reader
from tests.fuzz.readers import adapters, commands, data, models, runs, settings

READERS: dict[str, Reader] = {
    **models.READERS,
    **adapters.READERS,
    **runs.READERS,
    **data.READERS,
    **settings.READERS,
    **commands.READERS,
}
