# Two commands on a fresh machine:  make demo,  make test.  Everything they need they install into .venv, and RabbitMQ and
# PostgreSQL through the system's packages where that is possible (the scripts in deploy/local say what to do where not).

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYRIGHT := .venv-pyright
KURRENT := .venv-kurrentdb
KURRENT_INSTALLED := $(KURRENT)/.installed
AUDIT := .venv-audit
LOCK := .venv-lock
LOWEST := .venv-lowest
LOWEST_INSTALLED := $(LOWEST)/.installed
# Three processes for two cores, because many tests wait for processes of their own. Each starts a broker and a database,
# and one that has nothing left to do takes tests from the others. Where a broker or database is named, there is one for all.
SIDE_BY_SIDE := $(if $(TIDINGS_TEST_AMQP)$(TIDINGS_TEST_POSTGRESQL),,--numprocesses 3 --dist worksteal)
# Which tests run where: the markers in pyproject.toml say what each is for.
TESTS := not faults and not slow and not only_rabbitmq4

.PHONY: help demo demo-rabbitmq test test-all lint types wheel pytest faults services served postgresql rabbitmq4 kurrentdb pyright lower-bounds soak audit lock locked bench format broker database clean

help:
	@echo "make demo    real orders to shipments, in one process, nothing to install"
	@echo "make demo-rabbitmq"
	@echo "             the same as processes over RabbitMQ, some of them killed on the way"
	@echo "make test    lint, types, the wheel and tests, against a real RabbitMQ and PostgreSQL"
	@echo "make test-all"
	@echo "             the same, what is slow, all faults, the services' worlds on RabbitMQ, the log behind"
	@echo "             tidings server, services on PostgreSQL, kurrentdbclient, pyright, and the lowest"
	@echo "             versions of what Tidings needs"
	@echo "make rabbitmq4"
	@echo "             what a newer RabbitMQ could change, on RabbitMQ 4 from a Debian 13, which it makes once; needs root"
	@echo "make audit   known vulnerabilities of what is installed; needs the network, so no test runs it"
	@echo "make locked  install exactly what deploy/local/dev.lock names, each file by its hash; make lock renews it"
	@echo "make soak MINUTES=30"
	@echo "             random faults under order traffic, then everything is counted; SEED=N chooses the same again"
	@echo "make bench   the speed and memory that the README speaks of, as ratios"
	@echo "make format  let ruff format the code"

$(INSTALLED): pyproject.toml deploy/local/venv
	@echo "installing into $(VENV) (once) ..."
	@deploy/local/venv $(VENV)
	@touch $@

# Exactly the versions and files of the lock file, in place of the newest that pyproject.toml allows. An index that packs
# files anew has other hashes, so nobody needs this to run the tests.
locked:
	@TIDINGS_LOCKED=1 deploy/local/venv $(VENV)
	@touch $(INSTALLED)

lock: $(LOCK)/bin/uv
	@deploy/local/lock $(LOCK)

$(LOCK)/bin/uv: | $(INSTALLED)
	@$(BIN)/python -m venv $(LOCK)
	@$(LOCK)/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"

demo: $(INSTALLED)
	@$(BIN)/python -m services.demo

demo-rabbitmq: $(INSTALLED)
	@$(BIN)/python -m services.demo.fleet

test: lint types wheel pytest

test-all: TESTS := not faults and not only_rabbitmq4
test-all: test lower-bounds faults services served postgresql kurrentdb pyright

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-cache
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive framework services deploy deploy/local/rabbitmq deploy/local/postgresql deploy/local/nats deploy/local/kafka deploy/local/wheel deploy/local/audit

types: $(INSTALLED)
	$(BIN)/mypy

# The wheel runs the README's first service in an environment that holds nothing but what it requires.
wheel: $(INSTALLED)
	@$(BIN)/python deploy/local/wheel

pytest: $(INSTALLED) broker database
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "$(TESTS)"

# Side by side, but for those that promise something within seconds. A file breaks one broker, so its tests stay together.
faults: $(INSTALLED) broker database
	$(BIN)/pytest $(if $(SIDE_BY_SIDE),--numprocesses 2 --dist loadfile) -m "faults and not timed"
	$(BIN)/pytest -m timed tests/faults

# The services' tests once more, with their worlds on RabbitMQ and in real time.
services: $(INSTALLED) broker
	$(BIN)/pytest $(SIDE_BY_SIDE) --tidings=rabbitmq -m worlds tests/services

# The way of an event once more, with the log behind tidings server, as it would be in EventStoreDB.
served: $(INSTALLED) broker
	TIDINGS_TEST_STORE=server $(BIN)/pytest $(SIDE_BY_SIDE) -m served tests/integration

# What rests on a service's own database once more, with that database in PostgreSQL.
postgresql: $(INSTALLED) broker database
	TIDINGS_TEST_DATABASE=postgresql $(BIN)/pytest $(SIDE_BY_SIDE) -m "postgresql and not sqlite" tests/integration tests/unit

# What a newer RabbitMQ could change once more, on RabbitMQ 4. It runs from a small Debian 13 on an older one.
ON_RABBITMQ4 := tests/conformance/test_rabbitmq_bus.py tests/integration tests/faults
rabbitmq4: $(INSTALLED)
	@deploy/local/rabbitmq install --release 13
	TIDINGS_TEST_RABBITMQ_RELEASE=13 $(BIN)/pytest $(SIDE_BY_SIDE) -m "rabbitmq4 or only_rabbitmq4" $(ON_RABBITMQ4)

# kurrentdbclient is the successor of esdbclient, and cannot be installed beside it.
kurrentdb: $(KURRENT_INSTALLED)
	$(KURRENT)/bin/pytest -p no:cacheprovider tests/conformance/test_eventstoredb_store.py

$(KURRENT_INSTALLED): pyproject.toml deploy/local/venv
	@echo "installing into $(KURRENT) (once) ..."
	@deploy/local/venv $(KURRENT) kurrentdb,tests
	@touch $@

# pyright runs on Node, of which its wheel brings 200 MB, so it has an environment of its own.
pyright: $(INSTALLED) $(PYRIGHT)/bin/pyright
	TIDINGS_TEST_PYRIGHT=$(PYRIGHT)/bin/pyright $(BIN)/pytest -p no:cacheprovider tests/typing

$(PYRIGHT)/bin/pyright: | $(INSTALLED)
	@echo "installing into $(PYRIGHT) (once) ..."
	@$(BIN)/python -m venv $(PYRIGHT)
	@$(PYRIGHT)/bin/python -m pip install --quiet --disable-pip-version-check "pyright[nodejs]>=1.1.390"

# What pyproject.toml allows at the least: what users declare, the command line, settings, logs and pages.
lower-bounds: $(LOWEST_INSTALLED)
	$(LOWEST)/bin/pytest -p no:cacheprovider -W ignore::pytest.PytestUnraisableExceptionWarning -m lower_bounds tests/unit

$(LOWEST_INSTALLED): pyproject.toml deploy/local/lowest $(INSTALLED)
	@echo "installing into $(LOWEST) (once) ..."
	@$(BIN)/python -m venv $(LOWEST)
	@$(BIN)/python deploy/local/lowest cli fastapi rabbitmq postgresql eventstoredb testing > $(LOWEST)/constraints.txt
	@echo "click<8.2" >> $(LOWEST)/constraints.txt  # the first typers do not know later ones
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LOWEST)/constraints.txt \
		--editable ".[cli,fastapi,rabbitmq,postgresql,eventstoredb,testing]" httpx hypothesis import-linter pytest-timeout aiosqlite
	@touch $@

# It asks on the internet about each package: exit code 2 (make says "Error 2") and the reason where that cannot be done.
# In an environment of its own, because pip-audit would otherwise have an opinion about what Tidings may use.
audit: $(INSTALLED) $(AUDIT)/bin/pip-audit
	@$(BIN)/python -m pip freeze --exclude-editable > $(AUDIT)/installed.txt
	@$(BIN)/python deploy/local/audit $(AUDIT)/bin/pip-audit $(AUDIT)/installed.txt

$(AUDIT)/bin/pip-audit: | $(INSTALLED)
	@$(BIN)/python -m venv $(AUDIT)
	@$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit

broker: $(INSTALLED)
	@deploy/local/rabbitmq install

database: $(INSTALLED)
	@deploy/local/postgresql install

MINUTES := 30
soak: $(INSTALLED) broker
	@$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

bench: $(INSTALLED) broker
	$(BIN)/python -m tests.benchmarks

format: $(INSTALLED)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) $(KURRENT) $(PYRIGHT) $(AUDIT) $(LOCK) $(LOWEST) var .mypy_cache .ruff_cache .pytest_cache .hypothesis
