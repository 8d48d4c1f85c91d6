"""What the tests of conversations share with those of data."""

from tests.data.conftest import data_config, demo_tokenizer  # noqa: F401  (fixtures)
