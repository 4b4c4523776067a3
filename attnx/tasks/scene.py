"""Scene: a short film of objects on a grid, then questions: which object lay at that place in that frame?

A row: `frames` frames of `objects` tokens each, in random order, a token being what the object is and not where it lies; then
`questions` times a frame, a place, and the answer, which alone counts. Where and when is told beside the tokens only, by side
inputs for mechanisms that read such:

    visual bool [T]         an object, not a word
    frame int32 [T]         number of its frame from 1 on, 0 of words
    time int32 [T]          the same; words come after the film, one a time
    channel int32 [T]       its place, 0 of words
    box int32 [T, 4]        of its place: x0, y0, x1, y1
    coordinates float32 [T, 3], distances float32 [T, T]    column, row and time; what lies between two of them
    edges int32 [T, T]      0: two of one frame, or words; 1: of one place; 2: neither
    features float32 [T, 73]    the place as one of 73, all 0 of words
    markers int32 [T]       1 of the first half of the kinds
    task int32 [T]          frame of the first question, from 0 on, the same in all of the row

With `source` the film is the `source` int32 of an encoder, all places of its frames in order, empty ones too, and a row holds
the words alone. With `classify` a row is the film with one question, and its answer the label. Harder with more frames and
places.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row

FEATURES = 73   # what attnx.mechanisms.mixer.conditioned_pooling reads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    kinds: int = 8                  # different objects
    side: int = 3                   # rows and columns of the grid
    objects: int = 4                # in a frame, each at a place of its own
    frames: int = 3                 # of the film
    questions: int = 3              # asked after it
    source: bool = False            # the film is another sequence
    classify: bool = False          # the answer to one question is the row's label
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    kinds, side, frames = config.kinds, config.side, config.frames
    places, film = side * side, frames * config.objects
    for name in ('kinds', 'side', 'objects', 'frames', 'questions'):
        require(getattr(config, name) > 0, f'scene: {name} must be positive, got {getattr(config, name)}')
    require(config.objects <= places <= FEATURES,
            f'scene: objects {config.objects} must fit the {places} places of side {side}, of which {FEATURES} are the most')
    require(not (config.source and config.classify), 'scene: source and classify are two ways to ask; give one')
    questions = 1 if config.classify else config.questions
    natural = film + (2 if config.classify else 3 * questions)
    natural -= film if config.source else 0
    require(length in (0, natural), f'scene of this size has length {natural} (or give 0), got {length}')

    def make(rng):
        kind = rng.integers(kinds, size=(frames, config.objects))
        place = np.stack([rng.permutation(places)[: config.objects] for _ in range(frames)])
        asked = rng.integers(frames, size=questions), rng.integers(config.objects, size=questions)
        words = np.stack([kinds + asked[0], kinds + frames + place[asked], kind[asked]], axis=1)
        if config.source:
            shown = np.full((frames, places), kinds + frames + places, np.int32)
            np.put_along_axis(shown, place, kind, axis=1)
            out = row(words.reshape(-1), np.append(words.reshape(-1)[1:], 0), np.arange(natural) % 3 == 1, length=natural)
            return out | {'source': shown.reshape(-1), 'source_mask': np.ones(shown.size, bool)}
        text = words.reshape(-1)[: natural - film]
        tokens = np.concatenate([kind.reshape(-1), text])
        out = row(tokens, np.append(tokens[1:], 0), np.zeros(natural), length=natural)
        out['targets'][film + 1 :: 3] = words[:, 2]
        out['weights'][film + 1 :: 3] = 1
        if config.classify:
            out = {name: out[name] for name in ('tokens', 'positions')}
            out |= {'label': np.int32(words[0, 2]), 'weights': np.float32(1)}
        return out | sides(kind.reshape(-1), place.reshape(-1), text.size, int(asked[0][0]))

    def sides(kind, place, words, task):
        """The side inputs of a film and so many words after it."""
        number = lambda objects, text: np.concatenate([objects, np.broadcast_to(text, words)]).astype(np.int32)
        frame = number(1 + np.arange(film) // config.objects, 0)
        time = number(frame[:film], frames + 1 + np.arange(words))
        x, y = number(place % side, 0), number(place // side, 0)
        where = np.stack([x, y, time], axis=-1).astype(np.float32)
        seen, channel = frame > 0, number(place, 0)
        same = (frame[:, None] == frame, (channel[:, None] == channel) & seen[:, None] & seen)
        return {
            'visual': seen, 'frame': frame, 'time': time, 'channel': channel,
            'markers': number(2 * kind < kinds, 0), 'task': np.full(film + words, task, np.int32),
            'box': np.stack([x, y, x + 1, y + 1], axis=-1), 'coordinates': where,
            'distances': np.linalg.norm(where[:, None] - where, axis=-1).astype(np.float32),
            'edges': np.select(same, (0, 1), 2).astype(np.int32),
            'features': np.eye(FEATURES, dtype=np.float32)[channel] * seen[:, None],
        }  # fmt: skip

    return Task(kind='scene', length=natural, vocab_size=kinds + frames + places + config.source,
                num_classes=kinds if config.classify else 0, **generated(make, config, seed))  # fmt: skip
