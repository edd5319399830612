# Two commands on a fresh machine: `make demo` and `make test`. Both do all their own set-up.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo
PYRO_AVRNN_DATA ?= ../shared/data
TIMIT ?= $(PYRO_AVRNN_DATA)/timit.zip

.PHONY: demo test lint vowels timit tune-vowels tune-timit exact tune-music music music-models \
	speech digits images zoo swap benchmark clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.installed  ## a short run of the main job, under 6 minutes on 2 cores
	$(BIN)/avrnn compare --data vowels --seeds 1 --steps 300 --out $(OUT)

test: .venv/.installed  ## the whole suite, under 12 minutes on 2 cores
	$(BIN)/pytest -n auto

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The tables of RESULTS.md. Tuning reads the validation split only; its winners are the rows of
# `vowels` and `timit`. Results go to examples/results; --resume goes on after an interruption.
RAMPS := elbo-annealed:kl=0>1@0.25 elbo-annealed elbo-annealed:kl=0>1@0.75 elbo-annealed:kl=0>1@1
PAPER := alternating alternating:adversarial_lr=0.0005 alternating:guide=filtering \
	alternating:guide=filtering,adversarial_lr=0.0005
WEIGHTS := weight=0>10@0.5 weight=0>30@0.5 weight=0>100@0.5 weight=30
BESIDE := weight=0>0.3@0.5 weight=0>1@0.5 weight=0>3@0.5 weight=0>10@0.5
CANDIDATES := $(RAMPS) $(PAPER) $(WEIGHTS:%=conditional:%) $(WEIGHTS:%=joint:%) \
	$(WEIGHTS:%=conditional:standardise=true,%) $(BESIDE:%=conditional+kl:%) \
	$(BESIDE:%=joint+kl:%)
quoted = $(foreach row,$(1),'$(row)')

tune-vowels: .venv/.installed  ## 4 candidates a training, validation split, 1 seed
	$(BIN)/avrnn compare --data vowels --split valid --first-seed 100 --resume \
		--out examples/results/tune-vowels --rows $(call quoted,$(CANDIDATES))

# The winners on the validation split, and the rows that have nothing to tune.
ROWS := rnn elbo elbo-annealed alternating alternating:guide=filtering,adversarial_lr=0.0005 \
	conditional:weight=30 joint:weight=0>30@0.5 conditional:standardise=true,weight=0>100@0.5 \
	conditional+kl:weight=0>0.3@0.5 joint+kl
vowels: .venv/.installed  ## the table on vowels: 3 seeds
	$(BIN)/avrnn compare --data vowels --seeds 3 --resume \
		--out examples/results/vowels --rows $(call quoted,$(ROWS))

# On TIMIT a frame has 200 samples, so a nat of the KL is small beside the reconstruction.
SPEECH := --data $(TIMIT) --segment 100 --steps 800 --z-dim 16 --batch-size 32 --lr 0.001 --resume
LOUD := weight=30 weight=0>100@0.5 weight=0>1000@0.5
SPOKEN := $(filter-out %@1,$(RAMPS)) $(filter-out \
	alternating:adversarial_lr=0.0005,$(PAPER)) $(LOUD:%=conditional:%) $(LOUD:%=joint:%) \
	$(foreach w,1 10 100,conditional+kl:weight=0>$(w)@0.5 joint+kl:weight=0>$(w)@0.5)
tune-timit: .venv/.installed  ## 3 candidates a training, validation speakers, 1 seed
	$(BIN)/avrnn compare $(SPEECH) --split valid --first-seed 100 \
		--out examples/results/tune-timit --rows $(call quoted,$(SPOKEN))

timit: .venv/.installed  ## the table on TIMIT: 3 seeds
	$(BIN)/avrnn compare $(SPEECH) --seeds 3 --out examples/results/timit \
		--rows $(call quoted,rnn elbo elbo-annealed $(firstword $(PAPER)) $(lastword $(PAPER)) conditional:weight=30 \
		joint:weight=30 conditional+kl:weight=0>1@0.5 joint+kl:weight=0>100@0.5)

exact: .venv/.installed  ## bounds, filters and guides where the truth is known: 15 seconds
	$(BIN)/python examples/exact_references.py --out examples/results/exact

# Piano rolls: JSB_Chorales.mat, Nottingham.mat, Piano_midi.mat lie in MUSIC.
MUSIC ?= $(PYRO_AVRNN_DATA)
SONGS := $(BIN)/python examples/polyphonic_music.py
tune-music: .venv/.installed  ## 2 candidates a training on JSB, validation split, 1 seed
	$(SONGS) $(MUSIC)/JSB_Chorales.mat --tune --out examples/results/tune-music-jsb

music: .venv/.installed  ## the tables of music: JSB with 3 seeds, the others with 1
	$(SONGS) $(MUSIC)/JSB_Chorales.mat --seeds 3 --out examples/results/music-jsb
	$(SONGS) $(MUSIC)/Nottingham.mat --out examples/results/music-nottingham
	$(SONGS) $(MUSIC)/Piano_midi.mat --out examples/results/music-piano

music-models: .venv/.installed  ## RNN, STORN, SRNN and DMM on JSB, 1 seed
	$(SONGS) $(MUSIC)/JSB_Chorales.mat --rows rnn storn srnn dmm --out examples/results/music-jsb-models

speech: .venv/.installed  ## RNN, STORN, VRNN and SRNN on 16-bit mu-law TIMIT, in bits, 2 seeds
	$(BIN)/python examples/speech_in_bits.py $(TIMIT) --seeds 2 --out examples/results/speech

# Spoken digits (fsdd.zip) and the MNIST excerpt (mnist_5k.csv.gz) lie in DATA.
DATA ?= $(PYRO_AVRNN_DATA)
digits: .venv/.installed  ## DSAE on spoken digits: what f and z hold, 2 seeds
	$(BIN)/python examples/global_features.py --data $(DATA)/fsdd.zip --out examples/results/digits

images: .venv/.installed  ## PixelCNN-VAE and PixelCNN on MNIST
	$(BIN)/python examples/pixelcnn_vae.py $(DATA)/mnist_5k.csv.gz --out examples/results/mnist

zoo: .venv/.installed  ## every model on the vowels
	$(BIN)/python examples/model_zoo.py --out examples/results/zoo

swap: .venv/.installed  ## every prior with every guide, VRNN on the vowels
	$(BIN)/python examples/swap_guides_and_priors.py --jobs 2 --out examples/results/swap

benchmark: .venv/.installed  ## speed beside plain torch and JAX, growth, memory: 20 minutes, 2 threads
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python examples/benchmark.py --rounds 5 --out examples/results/benchmark

clean:
	rm -rf .venv runs
