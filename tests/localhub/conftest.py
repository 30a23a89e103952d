import pytest
from huggingface_hub import HfApi

from tests.support.hubs import Raw


@pytest.fixture
def raw(hub):
    return Raw(hub.endpoint)


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=False)
