import pytest
from train_models import make_model, make_windows


@pytest.fixture(scope="session")
def model_and_params():
    return make_model()


@pytest.fixture(scope="session")
def windows():
    return make_windows()
