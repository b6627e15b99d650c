# make run: draw.  make test: the whole suite.  make train RECIPE=tiny-cpu: all stages.  make data: the emoji set.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RECIPE ?= emoji-128
HOST ?= 127.0.0.1
PORT ?= 7860
DATA ?= runs/data/emoji-128
SIZE ?= 128
bin := .venv/bin

# Waiting OpenMP threads must not spin: where the cores are shared, spinning makes small models many times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

.PHONY: run test train data

run: .venv/installed-run
	$(bin)/python app.py --host $(HOST) --port $(PORT)

test: .venv/installed-test
	$(bin)/python -m pytest -q

train: .venv/installed-train
	$(bin)/python -m training all --recipe $(RECIPE)

data: .venv/installed-train
	$(bin)/python -m training.data.emoji --out $(DATA) --size $(SIZE)

# pip runs only when a stamp is older than the lists it stands for.
.venv/installed-run: requirements.txt
.venv/installed-train: requirements.txt requirements-train.txt
.venv/installed-test: requirements.txt requirements-train.txt requirements-test.txt

.venv/installed-%: | $(bin)/pip
	$(bin)/python -m pip install -q --disable-pip-version-check $(addprefix -r ,$(lastword $^))
	touch $@

# pip is the last thing a new environment gets: one whose making was interrupted is made again.
$(bin)/pip:
	$(PYTHON) -m venv .venv
