# `make help` lists the targets. Each does its own set-up, in .venv.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo
BASE ?= HEAD
PYRO_AVRNN_DATA ?= ../shared/data
# fsdd.zip, librispeech_100spk.zip and mnist_5k.csv.gz lie in DATA, the piano rolls (.mat) in MUSIC
DATA ?= $(PYRO_AVRNN_DATA)
MUSIC ?= $(PYRO_AVRNN_DATA)
TIMIT ?= $(PYRO_AVRNN_DATA)/timit.zip
STUDY := $(BIN)/python examples/studies

.PHONY: help demo test lint lint-format lint-rules lint-types lint-sizes hooks compare figures faults shrink clean \
	handbrakes baselines adversarial chords timit tune-timit exact tune-music music music-models \
	speech digits strings voices sprites information images zoo zoo-critics resamplers twists swap benchmark

help:  ## this list
	@awk -F ':.*  ## ' '/^##@/ {print "\n" substr($$0, 5)} \
		/^[a-z-]+:.*  ## / {printf "  %-13s %s\n", $$1, $$2}' Makefile

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

##@ Start here
demo: .venv/.installed  ## a short comparison on the built-in vowels, under 6 minutes on 2 cores
	$(BIN)/avrnn compare --data vowels --seeds 1 --steps 300 --out $(OUT) --overwrite

test: .venv/.installed  ## the whole suite, under 12 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto  # a process a core, and one thread in each

##@ For contributors
lint: lint-format lint-rules lint-types lint-sizes  ## check format, rules, types and the size of tracked files

lint-format: .venv/.installed
	$(BIN)/ruff format --check .

lint-rules: .venv/.installed
	$(BIN)/ruff check .

lint-types: .venv/.installed
	$(BIN)/mypy

lint-sizes:
	@git ls-files -z | xargs -0 wc -c | awk '$$2 != "total" {n++} \
		$$1 > 1000000 && $$2 != "total" {print "above 1 MB, do not commit it:", $$0; bad = 1} \
		END {if (!bad) print "No file above 1 MB among " n " tracked files"; exit bad}'

hooks: .venv/.installed  ## install git hooks that run the lint before each commit
	$(BIN)/pip install --quiet --disable-pip-version-check pre-commit
	$(BIN)/pre-commit install

compare: .venv/.installed  ## compare all numbers of the working tree with those of commit BASE (HEAD)
	$(STUDY)/compare_commits.py $(BASE)

figures: .venv/.installed  ## print the figures of the code: lines, long files and functions, duplicates
	$(BIN)/python tests/unit/test_house.py

faults: .venv/.installed  ## plant the faults of tests/mutations, name those that no test notices
	$(BIN)/python tests/mutations/run.py

shrink: .venv/.installed  ## make the pictures and records in examples/results small enough for git
	$(STUDY)/shrink.py examples/results

clean:  ## remove .venv and runs
	rm -rf .venv runs

##@ The studies behind RESULTS.md, which write to examples/results
# Tuning reads the validation split only; its winners are the rows of `timit`.
# --resume goes on after an interruption.
RAMPS := elbo-annealed:kl=0>1@0.25 elbo-annealed elbo-annealed:kl=0>1@0.75 elbo-annealed:kl=0>1@1
PAPER := alternating alternating:adversarial_lr=0.0005 alternating:guide=filtering \
	alternating:guide=filtering,adversarial_lr=0.0005
quoted = $(foreach row,$(1),'$(row)')

# On TIMIT a frame has 200 samples, so a nat of the KL is small next to the reconstruction.
SPEECH := --data $(TIMIT) --segment 100 --steps 800 --z-dim 16 --batch-size 32 --lr 0.001 --resume
LOUD := weight=30 weight=0>100@0.5 weight=0>1000@0.5
SPOKEN := $(filter-out %@1,$(RAMPS)) $(filter-out \
	alternating:adversarial_lr=0.0005,$(PAPER)) $(LOUD:%=conditional:%) $(LOUD:%=joint:%) \
	$(foreach w,1 10 100,conditional+kl:weight=0>$(w)@0.5 joint+kl:weight=0>$(w)@0.5)
tune-timit: .venv/.installed  ## choose the settings of `timit`: 3 candidates each, validation speakers, 1 seed
	$(BIN)/avrnn compare $(SPEECH) --split valid --first-seed 100 \
		--out examples/results/tune-timit --rows $(call quoted,$(SPOKEN))

timit: .venv/.installed  ## every way of training on TIMIT, 3 seeds
	$(BIN)/avrnn compare $(SPEECH) --seeds 3 --out examples/results/timit \
		--rows $(call quoted,rnn elbo elbo-annealed $(firstword $(PAPER)) $(lastword $(PAPER)) conditional:weight=30 \
		joint:weight=30 conditional+kl:weight=0>1@0.5 joint+kl:weight=0>100@0.5)

# What held the trainings back: the order and size of batches, the bound on the gradient, the learning rate.
BRAKES := $(foreach c,5 none,$(foreach b,sorted-rest shuffled-rest sorted shuffled,batches=$(b),clip_norm=$(c))) \
	clip_norm=1x clip_norm=2x clip_norm=10x clip_norm=5,lr=0.0003 clip_norm=5,lr=0.003 clip_norm=none,lr=0.0003 \
	prior=flow,batches=sorted-rest,clip_norm=5 prior=flow,clip_norm=5 prior=flow,clip_norm=none
WINDOWS := clip_norm=5 clip_norm=none prior=flow,clip_norm=5 prior=flow,clip_norm=none
CLIPS := 5 none 1x 2x 10x
handbrakes: .venv/.installed  ## what holds a training on TIMIT back, 3 seeds
	$(BIN)/avrnn compare $(SPEECH) --seeds 3 --out examples/results/handbrakes --rows $(BRAKES:%=elbo-annealed:%)
	$(BIN)/avrnn compare $(SPEECH) --window 100 --seeds 3 --out examples/results/handbrakes-windows \
		--rows $(WINDOWS:%=elbo-annealed:%)
	$(BIN)/avrnn compare $(SPEECH) --truncate 100 --seeds 3 --out examples/results/handbrakes-truncated \
		--rows elbo-annealed:clip_norm=5 elbo-annealed:clip_norm=none
	$(BIN)/avrnn compare --data vowels --seeds 3 --resume --out examples/results/handbrakes-vowels \
		--rows $(CLIPS:%=elbo-annealed:clip_norm=%) $(CLIPS:%=elbo-annealed:batches=sorted-rest,clip_norm=%)

# Baselines: the same random search for every row, on validation; then the winners with 3 seeds. LibriSpeech and the
# levels of TIMIT (bits) take the winners of TIMIT, the other piano rolls those of JSB. `make baselines-timit` is one
# set, OF_timit its options, STEPS_timit the steps of search and run: a search with fewer steps prefers learning rates
# that overfit in the run. Where the rate is given, SEARCH_set steps do.
SPOKEN_SETS := timit vowels librispeech digits bits
AGAINST := adversarial-timit adversarial-vowels
PLAYED := jsb nottingham piano
SETS := $(SPOKEN_SETS) $(AGAINST) $(PLAYED)
GUIDES := $(foreach g,filtering smoothing,elbo-annealed:guide=$(g) elbo-annealed:guide=$(g),prior=mixture \
	elbo-annealed:guide=$(g),prior=flow)
RATES := lr=0.0007~0.003
RATES_jsb := lr=0.002~0.01
SPACE := kl=0>1@0.1|0>1@0.25|0>1@0.5
TRIALS := 5
TRIALS_vowels := 12
TRIALS_adversarial-timit := 10
WAVES := --z-dim 16 --h-dim 128 --batch-size 32
OF_timit := --data $(TIMIT) $(WAVES)
OF_librispeech := --data $(DATA)/librispeech_100spk.zip $(WAVES)
OF_vowels := --data vowels --z-dim 8 --h-dim 64 --batch-size 64
OF_digits := --data $(DATA)/fsdd.zip --z-dim 16 --h-dim 128 --batch-size 64
OF_bits := --data $(TIMIT) --pcm 16 --window 100 --z-dim 16 --h-dim 128 --batch-size 8 --particles 16
STEPS_timit := 1500
STEPS_librispeech := 1500
STEPS_vowels := 1500
STEPS_digits := 1000
STEPS_bits := 500
SPACE_timit := features=mlp|loudness dropout=0|0.1
SPACE_vowels := clip_norm=10x|1x dropout=0|0.1 activation=relu|silu
SPACE_digits := clip_norm=10x|1x dropout=0|0.1 activation=relu|silu
MORE_bits := emission=autoregressive,components=3,width=32
comma := ,

# The critics in the same regime. What the paper leaves open is searched like all else; on TIMIT it is searched alone,
# with the settings that won for all six VRNNs.
CRITICS := conditional:guide=filtering joint:guide=filtering conditional+kl:guide=filtering joint+kl:guide=filtering
ROWS_adversarial-timit := elbo-annealed:guide=filtering alternating alternating:guide=filtering $(CRITICS)
ROWS_adversarial-vowels := $(ROWS_adversarial-timit)
OF_adversarial-timit := $(OF_timit)
OF_adversarial-vowels := $(OF_vowels)
STEPS_adversarial-timit := 1500
SEARCH_adversarial-timit := 500
FIXED_adversarial-timit := lr=0.0023 kl=0>1@0.25 features=loudness dropout=0
STEPS_adversarial-vowels := 1500
SPACE_adversarial-timit := weight=0>1@0.5|0>10@0.5|0>100@0.5|0>1000@0.5|30 adversarial_lr=0.00005|0.0005
SPACE_adversarial-vowels := $(SPACE_vowels) weight=0>0.3@0.5|0>3@0.5|0>30@0.5|30 adversarial_lr=0.00005|0.0005

# The RNN of TIMIT overfitted, its winner has dropout: in bits it also runs with the settings of the VRNNs.
ALSO_bits := rnn:lr=0.0023,features=loudness,dropout=0,$(MORE_bits)

# Five draws choose weight and settings of a critic together, so two more rows add a weak critic to the ELBO's winner.
WINNER_vowels := guide=filtering,lr=0.0023,kl=0>1@0.25,clip_norm=1x,dropout=0,activation=silu
ALSO_adversarial-vowels := $(foreach v,conditional joint,$(v)+kl:$(WINNER_vowels),weight=0>0.3@0.5)

# Chords whose keys depend on each other, with and without latents.
CHORDS := emission=autoregressive,activation=silu
NOTES := rnn:$(CHORDS) elbo-annealed:$(CHORDS) fivo:kl=0>1@0.5,$(CHORDS)
$(foreach set,$(PLAYED),$(eval ROWS_$(set) := $(NOTES)))
SPACE_jsb := h_dim=128|256 width=1024|2048 dropout=0.1|0.3
ROLLS := --z-dim 32 --batch-size 32 --validate-by fivo --particles 128 --transpose 5
OF_jsb = --data $(MUSIC)/JSB_Chorales.mat $(ROLLS)
OF_nottingham = --data $(MUSIC)/Nottingham.mat --segment 100 $(ROLLS)
OF_piano = --data $(MUSIC)/Piano_midi.mat --segment 100 $(ROLLS)
STEPS_jsb := 2000
STEPS_nottingham := 2000
STEPS_piano := 2000

rows_of = $(or $(ROWS_$(1)),rnn $(GUIDES))
LIKE_librispeech := timit
LIKE_bits := timit
LIKE_nottingham := jsb
LIKE_piano := jsb
TUNED = examples/results/tune-baselines-$(or $(LIKE_$(1)),$(1))
# MORE_set is appended to every row, winners of another set among them.
winners_of = $(if $(MORE_$(1)),$(call quoted,$(shell sed 's/$$/,$(MORE_$(1))/' $(TUNED)/rows.txt)),@$(TUNED)/rows.txt)
RUN := --compile --lr-decay cosine --validate-every 100 --patience 10 --resume

.PHONY: $(SETS:%=baselines-%) $(SETS:%=tune-baselines-%)
baselines: $(SPOKEN_SETS:%=baselines-%)  ## RNN and VRNNs by the ELBO on five sets of speech, tuned, 3 seeds
adversarial: $(AGAINST:%=baselines-%)  ## the ELBO against the critics in the same regime, 3 seeds
chords: $(PLAYED:%=baselines-%)  ## RNN and VRNN with autoregressive emissions on piano rolls, tuned, 3 seeds

$(SETS:%=tune-baselines-%): tune-baselines-%: .venv/.installed
	$(if $(SPACE_$*),$(BIN)/avrnn tune $(OF_$*) $(RUN) --steps $(or $(SEARCH_$*),$(STEPS_$*)) --trials $(or $(TRIALS_$*),$(TRIALS)) \
		--space $(call quoted,$(or $(FIXED_$*),$(or $(RATES_$*),$(RATES)) $(SPACE)) $(SPACE_$*)) --rows $(call quoted,$(call rows_of,$*)) --out $(call TUNED,$*))

$(SETS:%=baselines-%): baselines-%: tune-baselines-%
	$(BIN)/avrnn compare $(OF_$*) $(RUN) --steps $(STEPS_$*) --seeds 3 \
		--rows $(call winners_of,$*) $(call quoted,$(ALSO_$*)) --out examples/results/baselines-$*

exact: .venv/.installed  ## bounds, filters and guides against exact answers, 15 seconds
	$(STUDY)/exact_references.py --out examples/results/exact

SONGS := $(STUDY)/polyphonic_music.py
tune-music: .venv/.installed  ## choose the settings of `music`: 2 candidates each, JSB, validation split, 1 seed
	$(SONGS) $(MUSIC)/JSB_Chorales.mat --tune --out examples/results/tune-music-jsb

music: .venv/.installed  ## ELBO, IWAE and FIVO on piano rolls: JSB with 3 seeds, Nottingham and Piano-midi with 1
	$(SONGS) $(MUSIC)/JSB_Chorales.mat --seeds 3 --out examples/results/music-jsb
	$(SONGS) $(MUSIC)/Nottingham.mat --out examples/results/music-nottingham
	$(SONGS) $(MUSIC)/Piano_midi.mat --out examples/results/music-piano

music-models: .venv/.installed  ## RNN, STORN, SRNN and DMM on JSB, 1 seed
	$(SONGS) $(MUSIC)/JSB_Chorales.mat --rows rnn storn srnn dmm --out examples/results/music-jsb-models

speech: .venv/.installed  ## RNN, STORN, VRNN and SRNN on 16-bit mu-law TIMIT, in bits, 2 seeds
	$(STUDY)/speech_in_bits.py $(TIMIT) --seeds 2 --out examples/results/speech

# Objectives for the f of a DSAE: the ELBO, a bonus for I(x; f), with an adversary against I(f; z), and structure. Each
# is judged after its training.
ADVERSARY := information=infonce,gamma=0>100@0.4
OBJECTIVES := dsae dsae:guide=factorised dsae+mi dsae+mi:$(ADVERSARY) dsae+structure dsae+structure:$(ADVERSARY)
OF_F := --z-dim 16 --h-dim 96 --batch-size 48 --lr 0.003 --lr-decay cosine --steps 1500 --validate-every 100 --patience 10 \
	--particles 16 --seeds 3 --compile --resume
JUDGED_digits := $(DATA)/fsdd.zip
JUDGED_strings := $(DATA)/fsdd.zip --strings 3-5
JUDGED_voices := $(DATA)/librispeech_100spk.zip --n-mels 40 --segment 200
JUDGED_timit-voices := $(TIMIT) --n-mels 40 --segment 200
JUDGED_sprites := $(DATA)/sprites.zip --side 32
MORE_sprites := $(comma)features=image$(comma)emission=image
with_colon = $(if $(findstring :,$(1)),$(1)$(2),$(1):$(patsubst $(comma)%,%,$(2)))
judged_rows = $(foreach row,$(OBJECTIVES),$(if $(MORE_$(1)),$(call with_colon,$(row),$(MORE_$(1))),$(row)))
JUDGED := digits strings voices timit-voices sprites
.PHONY: $(JUDGED:%=judge-%)
digits: judge-digits  ## what f and z of a DSAE hold of spoken digits, six objectives, 3 seeds
strings: judge-strings  ## the same of strings of digits, where the speaker alone is global
voices: judge-voices judge-timit-voices  ## who speaks, by f and by z: LibriSpeech and TIMIT, 3 seeds
sprites: judge-sprites  ## the same of sprites, whose attributes and actions are known

$(JUDGED:%=judge-%): judge-%: .venv/.installed
	$(BIN)/avrnn compare --data $(JUDGED_$*) $(OF_F) --rows $(call quoted,$(call judged_rows,$*)) \
		--out examples/results/global-$*
	$(STUDY)/global_features.py examples/results/global-$* --data $(firstword $(JUDGED_$*))

information: .venv/.installed  ## critics of mutual information against normals, where it is known, 8 minutes
	$(STUDY)/information.py --out examples/results/information

images: .venv/.installed  ## PixelCNN-VAE and PixelCNN on MNIST
	$(STUDY)/pixelcnn_vae.py $(DATA)/mnist_5k.csv.gz --out examples/results/mnist

zoo: .venv/.installed  ## every model on the built-in vowels
	$(STUDY)/model_zoo.py --out examples/results/zoo

zoo-critics: .venv/.installed  ## every divergence, view and role of a critic, built-in vowels, 3 seeds
	$(STUDY)/critic_zoo.py --out examples/results/critics

resamplers: .venv/.installed  ## gradients of differentiable resamplers, and what proposals learn by them
	$(STUDY)/resamplers.py --out examples/results/resamplers

twists: .venv/.installed  ## twisted filters on a drift seen at its end, and on stochastic volatility
	$(STUDY)/twisted_filters.py --out examples/results/twists

swap: .venv/.installed  ## every prior with every guide of a VRNN, built-in vowels
	$(STUDY)/swap_guides_and_priors.py --jobs 2 --out examples/results/swap

benchmark: .venv/.installed  ## speed and memory next to plain torch and JAX, 20 minutes
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(STUDY)/benchmark.py --rounds 5 --out examples/results/benchmark
