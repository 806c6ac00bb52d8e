import pytest


@pytest.fixture(scope="session")
def peers(tmp_path_factory):
    """`{family: (peer, folder)}`, each made once."""
    from families import peer

    class Peers(dict):
        def __missing__(self, name):
            folder = tmp_path_factory.mktemp(name)
            self[name] = peer(name, folder), folder
            return self[name]

    return Peers()


@pytest.fixture(autouse=True, scope="session")
def quiet():
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
