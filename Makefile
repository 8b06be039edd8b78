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

.PHONY: help setup sample demo ladder bench test fuzz kills limits lint data simple medium strong boss push app report clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/installed  ## make the virtual environment

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements-app.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

$(VENV)/installed-app: requirements-app.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-app.txt -c constraints.txt
	touch $@

sample: $(VENV)/installed  ## generate the sample, with a small untrained model: data/sample
	$(BIN)/python make_sample.py --output_dir data/sample
	$(BIN)/python prepare_drcd.py --data_dir data/sample --output_dir data/sample/dataset

demo: sample  ## train the small model on the sample, score it, answer its test questions
	$(RUN_QA) --config configs/demo.yaml $(ARGS)

ladder: sample  ## what each lever of the course buys, on the sample: about 10 minutes on two cores
	$(BIN)/python benchmarks/ladder.py $(ARGS)

bench: sample  ## speed and memory against the textbook script: make bench ARGS="--dataset_name data/drcd --tokenizer bert-base-chinese"
	$(BIN)/python benchmarks/bench.py $(ARGS)

test: $(VENV)/installed-dev  ## run the tests
	$(BIN)/python -m pytest -q $(ARGS)

fuzz: $(VENV)/installed-dev  ## try bad and odd input on every script: make fuzz CASES=100000 (of each kind)
	OMP_NUM_THREADS=1 $(BIN)/python checks/fuzz.py --cases $(or $(CASES),2000) --subprocesses $(or $(SUBPROCESSES),20) $(ARGS)

kills: $(VENV)/installed  ## kill training 25 times and resume it: the weights must be those of an undisturbed run
	$(BIN)/python checks/kills.py $(ARGS)

limits: $(VENV)/installed  ## prepare 413,100 questions and answer 20,000 under memory limits: make limits COURSE_DATA=folder/of/hw7_dev.json
	$(BIN)/python checks/limits.py $(if $(COURSE_DATA),--course_data $(COURSE_DATA)) $(ARGS)

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
	@test -e "$(or $(RUN),$(error RUN=outputs/... is missing))/config.json" || { \
		echo "error: $(RUN) holds no model that could be loaded (an ensemble is answers only): push its members" >&2; exit 2; }
	$(BIN)/hf upload $(or $(REPO),$(error REPO=name/of-repository is missing)) $(RUN) . \
		--exclude "checkpoint-*" --exclude ".*" --exclude "report*" --exclude "runs/*" --exclude run.json --exclude trainer_state.json --exclude training_args.bin

app: $(VENV)/installed-app  ## a web page to ask trained models: make app RUN=outputs/demo
	$(BIN)/python app.py $(if $(RUN),--model_name_or_path $(RUN)) $(ARGS)

clean:  ## delete the virtual environment, the sample and the demo's run; data/drcd and other runs stay
	rm -rf $(VENV) data/sample outputs/demo
