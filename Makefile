# `make` alone lists the targets. A baseline's target takes more flags: make strong ARGS="--learning_rate 2e-5"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# More for accelerate, e.g. LAUNCH_ARGS="--config_file configs/accelerate/multi_gpu.yaml"
LAUNCH_ARGS ?=
ARGS ?=
# The config of `make boss`, its members, and the dataset that they and their ensemble are scored by
BOSS ?= configs/boss.yaml
MEMBERS = $(shell $(BIN)/python -c "import yaml; print(*yaml.safe_load(open('$(BOSS)'))['members'])")
DATASET ?= data/drcd
# Outside several processes, all cores: accelerate would leave a CPU run with one
export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
RUN_QA = $(BIN)/accelerate launch --quiet $(LAUNCH_ARGS) run_qa.py

.PHONY: help setup sample demo ladder test lint data simple medium strong boss report push clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/installed  ## make the virtual environment

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

sample: $(VENV)/installed  ## generate the sample, with a small untrained model: data/sample
	$(BIN)/python make_sample.py --output_dir data/sample
	$(BIN)/python prepare_drcd.py --data_dir data/sample --output_dir data/sample/dataset

demo: sample  ## train the small model on the sample, score it, answer its test questions
	$(RUN_QA) --config configs/demo.yaml $(ARGS)

ladder: sample  ## what each lever of the course buys, on the sample: about 10 minutes on two cores
	$(BIN)/python benchmarks/ladder.py $(ARGS)

test: $(VENV)/installed-dev  ## run the tests
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(VENV)/installed-dev  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

data: $(VENV)/installed  ## make data/drcd of the course files: make data DATA_DIR=folder/of/hw7_train.json
	$(BIN)/python prepare_drcd.py --data_dir $(or $(DATA_DIR),$(error DATA_DIR=folder/of/hw7_train.json is missing)) $(ARGS)

simple: $(VENV)/installed  ## the simple baseline: train, score dev, write submission.csv
	$(RUN_QA) --config configs/simple.yaml $(ARGS)

medium: $(VENV)/installed  ## the medium baseline
	$(RUN_QA) --config configs/medium.yaml $(ARGS)

strong: $(VENV)/installed  ## the strong baseline
	$(RUN_QA) --config configs/strong.yaml $(ARGS)

boss: $(VENV)/installed  ## the boss baseline: train the members of configs/boss.yaml, join their answers
	set -e; for member in $(or $(MEMBERS),$(error $(BOSS) has no members)); do $(RUN_QA) --config $(BOSS) --member $$member --dataset_name $(DATASET) $(ARGS); done
	$(BIN)/python postprocess.py $(foreach member,$(MEMBERS),outputs/$(basename $(notdir $(BOSS)))/$(member)) \
		--output_dir outputs/$(basename $(notdir $(BOSS))) --dataset_name $(DATASET)

report: $(VENV)/installed  ## a run's report.html and plots: make report RUN=outputs/strong OTHER=outputs/medium
	$(BIN)/python report.py $(or $(RUN),$(error RUN=outputs/... is missing)) $(addprefix --compare ,$(OTHER)) $(ARGS)

push: $(VENV)/installed  ## upload a run to the Hub: make push RUN=outputs/strong REPO=name/of-repository
	$(BIN)/hf upload $(or $(REPO),$(error REPO=name/of-repository is missing)) $(or $(RUN),$(error RUN=outputs/... is missing)) . \
		--exclude "checkpoint-*" --exclude training_args.bin --exclude run.json

clean:  ## delete the virtual environment, the sample and the demo's run; data/drcd and other runs stay
	rm -rf $(VENV) data/sample outputs/demo
