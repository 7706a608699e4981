"""Synthetic circuits as fixtures."""

import pytest
from circuits_drawn import HOSTILE, large_circuit, neuron_circuit, small_circuit

from mechsafety.circuits.circuit import RefusalCircuit


@pytest.fixture(scope="session")
def small() -> RefusalCircuit:
    return small_circuit()


@pytest.fixture(scope="session")
def large() -> RefusalCircuit:
    return large_circuit()


@pytest.fixture(scope="session")
def neurons() -> RefusalCircuit:
    return neuron_circuit()


@pytest.fixture(scope="session")
def loaded(small: RefusalCircuit) -> RefusalCircuit:
    return RefusalCircuit.from_json(small.to_json())


@pytest.fixture(scope="session")
def hostile() -> RefusalCircuit:
    return small_circuit(HOSTILE)


@pytest.fixture(params=["small", "large", "neurons", "loaded", "hostile"])
def circuit(request: pytest.FixtureRequest) -> RefusalCircuit:
    return request.getfixturevalue(request.param)
