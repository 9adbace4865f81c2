// The CUDA kernels of neurons with normalisation. As neuron.cuh, without torch or a header of CUDA's own.
//
// A position's features are shared out to a team of threads each, and the teams' sums are added up as a tree, in the
// same order in both memory orders: so both give the same bits. A chunk of kNeuNormChunk steps is gone through twice,
// once to sum over the features and once to use the sum. In between, spikes (as bits) and gradients (as they came) wait
// in shared memory, in slots that only one thread uses; where these do not fit, they are read again.
#pragma once

#include <type_traits>

#include "../core/neunorm.h"
#include "neuron.cuh"

namespace stbp::cuda {

// Minimum resident blocks of kNeuNormThreads per multiprocessor (__launch_bounds__): the most at which nothing spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kNeuNormBlocksOfPairs = 2;
#else
constexpr int kNeuNormBlocksOfPairs = 3;
#endif
template <class Scalar, class Tile>
constexpr int kNeuNormForwardBlocks = sizeof(Scalar) == 8    ? 1
                                      : Tile::kPositions > 1 ? kNeuNormBlocksOfPairs
                                                             : 3;
template <class Scalar>
constexpr int kNeuNormBackwardBlocks = sizeof(Scalar) == 8 ? 1 : 2;

// f(i) for all i < n, or for all k < steps of a chunk, unrolled.
template <int n, class F>
__device__ __forceinline__ void each(const F& f) {
#pragma unroll
  for (int i = 0; i < n; ++i) f(i);
}
template <class F>
__device__ __forceinline__ void each_step(int steps, const F& f) {
#pragma unroll
  for (int k = 0; k < kNeuNormChunk; ++k) {
    if (k >= steps) break;
    f(k);
  }
}

// Adds up `count` of at most n numbers, so many elements apart, as a tree: neighbours first.
template <int n, class State>
__device__ __forceinline__ State tree_sum(const State* from, int apart, int count) {
  State sums[n];
  each<n>([&](int i) { sums[i] = i < count ? from[i * apart] : State(0); });
#pragma unroll
  for (int width = 1; width < n; width *= 2)
#pragma unroll
    for (int i = 0; i < n; i += 2 * width) sums[i] += sums[i + width];
  return sums[0];
}

// What this thread has written itself; zeros where it has not.
template <class State, int n, class T>
__device__ __forceinline__ void load_own(State (&values)[n], const T* from) {
  const auto pack = from ? Pack<T, n>::load_own(from) : Pack<T, n>{};
  each<n>([&](int e) { values[e] = pack.get(e); });
}
template <class T, class State, int n>
__device__ __forceinline__ void store(T* to, const State (&values)[n]) {
  Pack<T, n>::of(values).store(to);
}

// To the next row: so many bytes, not elements, for which the address is added up in fewer instructions.
template <class T>
__device__ __forceinline__ void advance(T*& pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  pointer = reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + bytes);
}

// A tile of a thread's team: its place among them, and where its first neuron lies in a [C, P] or [P, C] array.
struct Cursor {
  int tile;
  int64_t at;
};

// A thread's place in its block.
template <class State, class Tile>
struct Block {
  static constexpr int kPositions = Tile::kPositions;

  const NeuNormPlan& plan;
  State* scratch;  // shared by the block
  int sample;      // or group of them
  int row, team, lane;
  int tiles;  // of this thread: none where it has no position, so that it only comes along

  template <class Io>
  __device__ __forceinline__ Block(const Io& io, const NeuNormPlan& plan_, State* scratch_)
      : plan(plan_), scratch(scratch_) {
    sample = int(blockIdx.x / unsigned(plan.rows));
    row = int(blockIdx.x % unsigned(plan.rows));
    // Neighbouring threads have neighbours in memory.
    const bool teams_first = kPositions == 1 && (Tile::kFeatures > 1 || io.channels_last);
    const int thread = int(threadIdx.x);
    team = teams_first ? thread & (plan.teams - 1) : thread >> plan.lane_bits;
    lane = teams_first ? thread >> plan.team_bits : thread & (plan.lanes - 1);
    tiles = position() < io.positions ? (plan.packs + (team < plan.more_packs)) * (plan.pack / Tile::kFeatures) : 0;
  }
  __device__ __forceinline__ int64_t position() const {  // the first of this thread's
    return (int64_t(row) * plan.lanes + lane) * kPositions;
  }
  __device__ __forceinline__ bool keeps_maps() const { return team == 0 && tiles > 0; }

  // This team's features: packs of plan.pack neighbours, of which the thread moves kFeatures at once.
  __device__ __forceinline__ Cursor first(const NeuNormPlace& at) const {
    return {0, team * plan.pack * at.feature_stride + position() * at.position_stride};
  }
  __device__ __forceinline__ void next(Cursor& cursor) const {
    ++cursor.tile;
    cursor.at += Tile::kFeatures > 1 || (cursor.tile & (plan.pack - 1)) == 0 ? plan.to_next_pack : plan.to_next_feature;
  }
  __device__ __forceinline__ Cursor ahead(Cursor cursor, int tiles_further) const {
#pragma unroll
    for (int i = 0; i < tiles_further; ++i) next(cursor);
    return cursor;
  }
  // This thread's slots in shared memory, of so many for each tile; neighbours are 32 apart.
  template <class Slot>
  __device__ __forceinline__ Slot* slots(int of_tile) const {
    const int warp = int(threadIdx.x) / 32;
    return reinterpret_cast<Slot*>(shared_bytes()) + warp * plan.tiles * of_tile * 32 + int(threadIdx.x) % 32;
  }

  // Sums the values over all teams in a fixed order; every thread gets the totals of its positions.
  __device__ __forceinline__ void sum(State (&values)[kNeuNormChunk][kPositions]) const {
    if constexpr (Tile::kInWarp) {
#pragma unroll 1
      for (int apart = 1; apart < plan.teams; apart *= 2)
        each<kNeuNormChunk>([&](int k) { values[k][0] += __shfl_xor_sync(~0u, values[k][0], apart); });
    } else {
      // A thread adds up 8 teams' values at one step, then each thread those parts. The two barriers are enough for one
      // call after the other: no thread writes parts before all have read the last ones and written their values.
      const int threads = plan.threads(), parts = (plan.teams + kNeuNormChunk - 1) / kNeuNormChunk;
      State* const part = scratch + kNeuNormChunk * threads;  // [K, parts, lanes]
      const int first_team = team / kNeuNormChunk * kNeuNormChunk;
      each<kPositions>([&](int p) {
        each<kNeuNormChunk>([&](int k) { scratch[k * threads + team * plan.lanes + lane] = values[k][p]; });
        __syncthreads();
#pragma unroll 1
        for (int k = team % kNeuNormChunk; k < kNeuNormChunk; k += plan.teams)
          part[(k * parts + team / kNeuNormChunk) * plan.lanes + lane] = tree_sum<kNeuNormChunk>(
              scratch + k * threads + first_team * plan.lanes + lane, plan.lanes, plan.teams - first_team);
        __syncthreads();
        each<kNeuNormChunk>([&](int k) {
          values[k][p] = tree_sum<kMostTeams / kNeuNormChunk>(part + k * parts * plan.lanes + lane, plan.lanes, parts);
        });
      });
    }
  }

  // Adds up over all threads, for each of the block's strips: [strips, 2] numbers from `to` on.
  __device__ __forceinline__ void store_totals(State* to, const State (&values)[kPositions]) const {
    const int of_strip = plan.strip * plan.teams, strips = plan.lanes * kPositions / plan.strip;
    __syncthreads();
    each<kPositions>([&](int p) {
      const int place = lane * kPositions + p;
      scratch[place / plan.strip * of_strip + team * plan.strip + place % plan.strip] = values[p];
    });
    __syncthreads();
    const int strip = int(threadIdx.x);
    if (strip >= strips || int64_t(row) * strips + strip >= plan.strips) return;
    State total = 0;
    for (int i = 0; i < of_strip; ++i) total += scratch[strip * of_strip + i];
    to[2 * strip] = total;
  }
};

// A chunk's rows of a tile, with zeros after the last step and all loads under way at once. In parts of two neurons
// where these have one word or a tile has four, which are worked on one after the other.
template <class Scalar, class Tile>
struct ChunkRows {
  static constexpr int kPart = Tile::kWidth > 2 || (Tile::kWidth == 2 && sizeof(Scalar) == 2) ? 2 : 1;
  static constexpr int kParts = Tile::kWidth / kPart;
  using Row = Pack<Scalar, Tile::kWidth>;
  using Part = Pack<Scalar, kPart>;
  Part parts[kNeuNormChunk][kParts];

  __device__ __forceinline__ void load(const Scalar* from, int64_t row_bytes, int steps) {
    each<kNeuNormChunk>([&](int k) {
      const Row row = k < steps ? Row::load(from) : Row{};
      memcpy(parts[k], row.words, sizeof(row));
      advance(from, row_bytes);
    });
  }
  __device__ __forceinline__ void store(Scalar* to, int64_t row_bytes, int steps) const {
    each_step(steps, [&](int k) {
      Row row;
      memcpy(row.words, parts[k], sizeof(row));
      row.store(to);
      advance(to, row_bytes);
    });
  }
  __device__ __forceinline__ state_t<Scalar> get(int k, int e) const { return parts[k][e / kPart].get(e % kPart); }
};

// A block for every row of lanes of every sample.
template <class Tile, class Scalar, class Neuron>
__global__ void __launch_bounds__(kNeuNormThreads, (kNeuNormForwardBlocks<Scalar, Tile>))
    neunorm_forward(const NeuNormForward<Scalar> io, const NeuNormPlan plan, Neuron neuron) {
  using State = state_t<Scalar>;
  constexpr int kWidth = Tile::kWidth, kPositions = Tile::kPositions;
  constexpr int kAhead = Tile::kAhead, kBuffers = kAhead > 0 ? kAhead : 1;
  constexpr bool kBinary = Neuron::kBinary;
  static_assert(kNeuNormChunk == 8, "a byte has a neuron's spikes of a chunk");
  using Bits = std::conditional_t<kWidth == 1, uint8_t, std::conditional_t<kWidth == 2, uint16_t, uint32_t>>;
  __shared__ State scratch[kNeuNormScratch<Tile::kInWarp>];
  const Block<State, Tile> block(io, plan, scratch);
  const NeuNormPlace at(io, block.sample, 0);
  if (io.decays) neuron.c.decay = io.decays[0];
  const int64_t row_bytes = plan.row_bytes;
  const bool held = plan.shared_bytes > 0;
  Bits* const slots = block.template slots<Bits>(1);
  State a[kPositions] = {};
  for (int64_t start = 0; start < io.steps; start += kNeuNormChunk) {
    const int steps = int(io.steps - start < kNeuNormChunk ? io.steps - start : kNeuNormChunk);
    const int64_t rows_at = at.neuron(start, 0), states_at = at.neuron(start / kNeuNormChunk, 0);
    State map[kNeuNormChunk][kPositions] = {};  // S, then a
    {
      ChunkRows<Scalar, Tile> rows[kBuffers];
      State v[kBuffers][kWidth];
      Cursor cursor = block.first(at);
      const auto fetch = [&](int j, int further) {
        const Cursor ahead = block.ahead(cursor, further);
        const bool there = ahead.tile < block.tiles;
        rows[j].load(io.x + (rows_at + ahead.at), row_bytes, there ? steps : 0);
        load_own(v[j], there && start > 0 ? io.states + (states_at - plan.row + ahead.at) : nullptr);
      };
      each<kAhead>([&](int j) { fetch(j, j); });
      while (cursor.tile < block.tiles) {
#pragma unroll
        for (int j = 0; j < kBuffers; ++j) {
          if (cursor.tile >= block.tiles) break;
          if constexpr (kAhead == 0) fetch(j, 0);
          Bits bits = 0;
          Scalar* to = io.normalised + (rows_at + cursor.at);
          each_step(steps, [&](int k) {
            State spikes[kWidth];
            each<kWidth>([&](int e) {
              neuron.step(v[j][e], rows[j].get(k, e), spikes[e]);
              map[k][e % kPositions] += spikes[e];
              if (spikes[e] != State(0)) bits |= Bits(1) << (8 * e + k);
            });
            if constexpr (!kBinary) store(to, spikes);
            if constexpr (!kBinary) advance(to, row_bytes);
          });
          if (kBinary && held) slots[cursor.tile * 32] = bits;
          if (kBinary && !held) {
#pragma unroll 1
            for (int k = 0; k < steps; ++k) {
              State spikes[kWidth];
              each<kWidth>([&](int e) { spikes[e] = State(bits >> (8 * e + k) & 1u); });
              store(to, spikes);
              advance(to, row_bytes);
            }
          }
          if (start + kNeuNormChunk < io.steps) store(io.states + (states_at + cursor.at), v[j]);
          if constexpr (kAhead > 0) fetch(j, kAhead);
          block.next(cursor);
        }
      }
    }
    const NeuNormConstants<State> norm(io, State(plan.share));  // not kept in registers over the loops
    block.sum(map);
    const int64_t map_at = at.map(start) + block.position();
    State *sums = io.sums + map_at, *maps = io.maps + map_at;
    each_step(steps, [&](int k) {
      if (block.keeps_maps()) store(sums, map[k]);
      each<kPositions>([&](int p) { map[k][p] = a[p] = norm.decay * a[p] + norm.gain * map[k][p]; });
      if (block.keeps_maps()) store(maps, a);
      sums += plan.map_row;
      maps += plan.map_row;
    });
    for (Cursor cursor = block.first(at); cursor.tile < block.tiles; block.next(cursor)) {
      const auto weight = Pack<State, kWidth>::load(io.weight + cursor.at);
      Scalar* to = io.normalised + (rows_at + cursor.at);
      Bits bits = 0;
      if (kBinary && held) bits = slots[cursor.tile * 32];
      if (kBinary && !held) {
        const Scalar* from = to;
#pragma unroll 1
        for (int k = 0; k < steps; ++k) {
          const auto spikes = Pack<Scalar, kWidth>::load_own(from);
          advance(from, row_bytes);
          each<kWidth>([&](int e) { bits |= Bits(spikes.get(e) != State(0)) << (8 * e + k); });
        }
      }
      each_step(steps, [&](int k) {
        State y[kWidth] = {};
        if constexpr (!kBinary) load_own(y, to);
        each<kWidth>([&](int e) {
          if constexpr (kBinary) y[e] = bits >> (8 * e + k) & 1u ? State(1) : State(0);
          y[e] -= weight.get(e) * map[k][e % kPositions];
        });
        store(to, y);
        advance(to, row_bytes);
      });
    }
  }
}

// A block for every row of lanes of every group of samples, one sample after the other.
template <class Tile, class Scalar, class Neuron>
__global__ void __launch_bounds__(kNeuNormThreads, (kNeuNormBackwardBlocks<Scalar>))
    neunorm_backward(const NeuNormBackward<Scalar> io, const NeuNormPlan plan, Neuron neuron) {
  using State = state_t<Scalar>;
  using Rows = ChunkRows<Scalar, Tile>;
  using Part = typename Rows::Part;
  constexpr int kWidth = Tile::kWidth, kPositions = Tile::kPositions, kPart = Rows::kPart, kParts = Rows::kParts;
  constexpr int kAhead = kPositions > 1 ? 1 : Tile::kAhead, kBuffers = kAhead > 0 ? kAhead : 1;
  constexpr int kGroup = kNeuNormChunk / (kParts > 1 || sizeof(Scalar) == 8 ? 4 : 2), kSlots = kNeuNormChunk * kParts;
  __shared__ State scratch[kNeuNormScratch<Tile::kInWarp>];
  const Block<State, Tile> block(io, plan, scratch);
  if (io.decays) neuron.c.decay = io.decays[0];
  const int64_t row_bytes = plan.row_bytes;
  const bool held = plan.shared_bytes > 0;
  Part* const slots = block.template slots<Part>(kSlots);
  const int group = block.sample;
  const int from = group * plan.samples + (group < plan.more_samples ? group : plan.more_samples);
  const int to = from + plan.samples + (group < plan.more_samples);
  State grad_decay[kPositions] = {}, grad_norm_decay[kPositions] = {};
  for (int sample = from; sample < to; ++sample) {
    const NeuNormPlace at(io, sample, 0);
    State* const grad_weights = io.grad_weight + at.weight(group, 0);
    State* const carries = io.carried + (io.carried ? at.weight(group, 0) : 0);
    State carried[kPositions] = {};  // norm_decay A[t+1]
    for (int64_t chunk = (io.steps - 1) / kNeuNormChunk; chunk >= 0; --chunk) {
      const int64_t start = chunk * kNeuNormChunk;
      const int steps = int(io.steps - start < kNeuNormChunk ? io.steps - start : kNeuNormChunk);
      const bool last = start + kNeuNormChunk >= io.steps;
      const int64_t map_at = at.map(start) + block.position();
      const Scalar* const grad_y = io.grad_normalised + at.neuron(start, 0);
      State grad_map[kNeuNormChunk][kPositions] = {};  // the sum of U g, then A, then gain A
      {
        Pack<State, kPositions> map[kNeuNormChunk];
        const State* maps = io.maps + map_at;
        each<kNeuNormChunk>([&](int k) {
          map[k] = k < steps && block.tiles > 0 ? Pack<State, kPositions>::load(maps) : Pack<State, kPositions>{};
          maps += plan.map_row;
        });
        Rows upstream[kBuffers];
        Pack<State, kWidth> weight[kBuffers];
        State grad_weight[kBuffers][kWidth];
        Cursor cursor = block.first(at);
        const auto fetch = [&](int j, int further) {
          const Cursor ahead = block.ahead(cursor, further);
          const bool there = ahead.tile < block.tiles;
          upstream[j].load(grad_y + ahead.at, row_bytes, there ? steps : 0);
          weight[j] = there ? Pack<State, kWidth>::load(io.weight + ahead.at) : Pack<State, kWidth>{};
          load_own(grad_weight[j], there && !(last && sample == from) ? grad_weights + ahead.at : nullptr);
        };
        each<kAhead>([&](int j) { fetch(j, j); });
        while (cursor.tile < block.tiles) {
#pragma unroll
          for (int j = 0; j < kBuffers; ++j) {
            if (cursor.tile >= block.tiles) break;
            if constexpr (kAhead == 0) fetch(j, 0);
            each_step(steps, [&](int k) {
              each<kWidth>([&](int e) {
                grad_map[k][e % kPositions] += weight[j].get(e) * upstream[j].get(k, e);
                grad_weight[j][e] -= upstream[j].get(k, e) * map[k].get(e % kPositions);
              });
            });
            Part* const slot = slots + cursor.tile * kSlots * 32;
            if (held) each<kSlots>([&](int i) { slot[i * 32] = upstream[j].parts[i / kParts][i % kParts]; });
            store(grad_weights + cursor.at, grad_weight[j]);
            if constexpr (kAhead > 0) fetch(j, kAhead);
            block.next(cursor);
          }
        }
      }
      // To go back with. The first tile is under way while the teams add up.
      const State* const states = chunk > 0 ? io.states + at.neuron(chunk - 1, 0) : nullptr;
      Rows rows;
      State v[kWidth];
      Cursor cursor = block.first(at);
      const auto fetch = [&] {
        const bool there = cursor.tile < block.tiles;
        rows.load(io.x + at.neuron(start, 0) + cursor.at, row_bytes, there ? steps : 0);
        load_states(v, there ? states : nullptr, cursor.at);
      };
      fetch();
      const NeuNormConstants<State> norm(io, State(plan.share));  // not kept in registers over the loops
      block.sum(grad_map);
#pragma unroll
      for (int k = kNeuNormChunk - 1; k >= 0; --k) {
        if (k >= steps) continue;
        each<kPositions>([&](int p) {
          grad_map[k][p] = carried[p] - grad_map[k][p];
          carried[p] = norm.decay * grad_map[k][p];
        });
      }
      if (io.grad_decays && block.keeps_maps()) {
        const State *maps = io.maps + map_at - plan.map_row, *sums = io.sums + map_at;
        each_step(steps, [&](int k) {
          each<kPositions>([&](int p) {
            const State before = k > 0 || start > 0 ? __ldg(maps + p) : State(0);
            grad_norm_decay[p] += grad_map[k][p] * (before - __ldg(sums + p) * norm.share);
          });
          maps += plan.map_row;
          sums += plan.map_row;
        });
      }
      each<kNeuNormChunk * kPositions>([&](int i) { grad_map[i / kPositions][i % kPositions] *= norm.gain; });
      while (cursor.tile < block.tiles) {
        const int64_t here = cursor.at;
        const Part* const slot = slots + cursor.tile * kSlots * 32;
        block.next(cursor);
        State grad_v[kWidth];
        load_own(grad_v, last ? nullptr : carries + here);
        each<kParts>([&](int part) {
          State u[kNeuNormChunk][kPart], before[kPart], of_feature[kPart] = {};
          each<kPart>([&](int e) { before[e] = v[part * kPart + e]; });
#pragma unroll
          for (int k = 0; k < kNeuNormChunk; ++k) {
            if (k % kGroup == 0 && k >= steps) break;
            each<kPart>([&](int e) {
              State unused;
              u[k][e] = neuron.step(v[part * kPart + e], rows.parts[k][part].get(e), unused);
            });
          }
          if constexpr (kParts == 1) fetch();
          // The gradients of a few steps at a time, as registers are short.
#pragma unroll
          for (int first = kNeuNormChunk - kGroup; first >= 0; first -= kGroup) {
            if (first >= steps) continue;
            // The surrogate's derivative, then dL/du. What lies past the last step is not used.
            State grad[kGroup][kPart];
            neuron.surrogate.visit([&](const auto& surrogate) {
              each<kGroup * kPart>([&](int i) {
                const int k = i / kPart, e = i % kPart;
                grad[k][e] = surrogate.derivative(u[first + k][e] - neuron.c.v_threshold);
              });
            });
            Part upstream[kGroup];
            if (held) {
              each<kGroup>([&](int k) { upstream[k] = slot[((first + k) * kParts + part) * 32]; });
            } else {
              const Scalar* again = grad_y + here + part * kPart;
              advance(again, first * row_bytes);
              each<kGroup>([&](int k) {
                upstream[k] = first + k < steps ? Part::load(again) : Part{};
                advance(again, row_bytes);
              });
            }
#pragma unroll
            for (int k = kGroup - 1; k >= 0; --k) {
              if (first + k >= steps) continue;
              each<kPart>([&](int e) {
                const State grad_spike = upstream[k].get(e) + grad_map[first + k][e % kPositions];
                grad[k][e] = neuron.step_back(u[first + k][e], grad[k][e], grad_spike, grad_v[part * kPart + e]);
                if (io.grad_decays)  // from the last step to the first, for any kGroup
                  of_feature[e] += grad[k][e] * (first + k > 0 ? neuron.after(u[first + k - 1][e]) : before[e]);
              });
            }
            Scalar* grad_x = io.grad_x + at.neuron(start, 0) + here;
            advance(grad_x, first * row_bytes);
#pragma unroll
            for (int k = 0; k < kGroup; ++k) {
              if (first + k >= steps) break;
              if constexpr (kParts == 1) store(grad_x, grad[k]);
              if constexpr (kParts == 1) advance(grad_x, row_bytes);
              if constexpr (kParts > 1) rows.parts[first + k][part] = Part::of(grad[k]);
            }
          }
          each<kPart>([&](int e) { grad_decay[e % kPositions] += of_feature[e]; });
        });
        if constexpr (kParts > 1) rows.store(io.grad_x + at.neuron(start, 0) + here, row_bytes, steps);
        if constexpr (kParts > 1) fetch();
        if (chunk > 0) store(carries + here, grad_v);
      }
    }
  }
  if (io.grad_decays) {
    const int64_t strip = int64_t(block.row) * plan.lanes * kPositions / plan.strip;
    State* const totals = io.grad_decays + (group * plan.strips + strip) * 2;
    block.store_totals(totals, grad_decay);
    block.store_totals(totals + 1, grad_norm_decay);
  }
}

// The widest pack of neighbours in memory in which the arrays of a call can be moved.
template <class Scalar, class Io>
WidestPack<Scalar> widest_of_neunorm(const Io& io) {
  WidestPack<Scalar> pack(io.channels_last ? io.features : io.positions);
  if (io.positions == 1) pack = WidestPack<Scalar>(io.features);
  pack.at(io.x).at(io.weight).at(io.sums).at(io.maps).at(io.states);
  return pack;
}
template <class Scalar>
int widest_pack(const NeuNormForward<Scalar>& io) {
  return widest_of_neunorm<Scalar>(io).at(io.normalised);
}
template <class Scalar>
int widest_pack(const NeuNormBackward<Scalar>& io) {
  return widest_of_neunorm<Scalar>(io).at(io.grad_normalised).at(io.grad_x).at(io.grad_weight).at(io.carried);
}

}  // namespace stbp::cuda
