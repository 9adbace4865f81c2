// How the CUDA kernels are launched: pure functions of a call and a GPU, which the tests run on a CPU, and whose
// results the kernels are given by value.
#pragma once

#include <cstdint>
#include <variant>

#include "../core/io.h"
#include "../core/neunorm.h"
#include "../core/number.h"
#include "../neurons/registry.h"
#include "launch.h"

namespace stbp::cuda {

// What the plans ask of a GPU.
struct DeviceProperties {
  int processors;
  int shared_bytes;  // that a block may have if it asks for them
};

struct LifPlan {
  int rows;        // of the kernel for T <= rows, or 0 of the one for any T
  int width;       // neurons of a thread
  int threads;     // of a block
  int64_t blocks;  // enough for all neurons
};

constexpr int kMostThreads = 128;  // of a block
constexpr int kMostRows = 8;

// The smallest number of rows that LIF kernels are compiled for and that is enough for T steps, or 0.
constexpr int lif_rows(int64_t steps, int scalar_bytes) {
  if (scalar_bytes == 8 || steps > kMostRows) return 0;  // double is for checking gradients
  return steps <= 1 ? 1 : steps <= 2 ? 2 : steps <= 4 ? 4 : kMostRows;
}

// Neurons of a thread where there are many: a pack of 16 bytes, which takes the fewest instructions. Of half types
// going back over 8 steps and more, 8 bytes, whose potentials in float32 take half the registers: 20 warps a
// multiprocessor in place of 12, which the latency of memory needs. (Of double one neuron.)
constexpr int lif_pack(int rows, int scalar_bytes, bool backward) {
  if (scalar_bytes == 8) return 1;
  return (backward && scalar_bytes == 2 && (rows == 0 || rows == kMostRows) ? 8 : 16) / scalar_bytes;
}

// T steps of N neurons of so many bytes each, which pointers and N allow to be moved in packs of at most `widest`.
//
// Below two blocks of packs for each multiprocessor, single neurons spread the same loads over more threads and
// multiprocessors; and below one block for each, smaller blocks do.
inline LifPlan plan_lif(int64_t steps, int64_t neurons, int scalar_bytes, bool backward, int widest,
                        const DeviceProperties& device) {
  LifPlan plan{lif_rows(steps, scalar_bytes), 1, kMostThreads, 0};
  const int pack = lif_pack(plan.rows, scalar_bytes, backward);
  if (pack <= widest && neurons / pack >= int64_t(device.processors) * 2 * kMostThreads) {
    plan.width = pack;
  } else if (plan.rows > 0) {
    plan.rows = kMostRows;  // one kernel of single neurons for every small T
  }
  const int64_t threads = (neurons + plan.width - 1) / plan.width;
  while (plan.threads > 32 && threads < int64_t(device.processors) * plan.threads) plan.threads /= 2;
  plan.blocks = (threads + plan.threads - 1) / plan.threads;
  return plan;
}

// Neurons of a thread of the general kernels where there are many: with their parameters, and the gradients of these,
// more would not fit into the registers. (Of double one neuron.)
template <int kScalarBytes>
constexpr int kGeneralPack = kScalarBytes == 8 ? 1 : 4;
constexpr int kGeneralAtOnce = 4;  // steps whose rows a thread loads at once

// How the sums over neurons that share a parameter are shared out. Follows from the call alone, since the caller
// allocates `partial` by it.
//
// The neurons are a table of `repeats` rows of one period: the positions that differ in their parameters, or any number
// of neurons where all share one. A block has neighbouring positions of a group of repeats. Its threads sum over
// repeats and steps, then the block over its threads; where the positions of an entry end, within a block or with it, a
// sum does: sum number b + c for block b and entry c.
struct GeneralSplit {
  bool learned;
  int pack;        // neurons of a thread, as far as the shape allows
  int lanes;       // threads side by side, with packs
  bool own;        // neighbours have entries of their own, so that a thread has sums for each neuron
  int parameters;  // of the neuron, without scale and shift
  bool affine;
  int64_t group, count;     // neuron n has entry n / group % count
  int64_t rows, cells;      // of scale and shift; sums for each entry, of all parameters and rows: 0 if not learned
  int64_t period, repeats;  // period * repeats >= N
  int64_t columns, groups;  // blocks: side by side, and groups of repeats
  int64_t held;             // doubles of all blocks' threads that do not fit into shared memory

  STBP_FN int64_t sums() const { return columns + count; }  // of one cell and group
  int64_t partial() const { return cells * groups * sums() + held; }
};

struct GeneralPlan : GeneralSplit {
  int width;        // neurons of a thread
  int threads;      // of a block
  int thread_rows;  // repeats that a block works on at once
  int64_t passes;   // repeats of a thread
  int64_t blocks;
  int shared_bytes;      // for a block's sums
  int team;              // threads that add up the sums of an entry; a power of 2
  int64_t entry_blocks;  // that do so for all entries
};

constexpr int kLearningLanes = 32;  // 128 bytes of a half type; the other threads of a block have other repeats

template <class Scalar>
GeneralSplit split_general(const Layout& layout, const Extras<state_t<Scalar>>& extras, const NeuronOptions& options) {
  constexpr int kPack = kGeneralPack<sizeof(Scalar)>, kSharedBytes = 48 * 1024;
  // Blocks for any GPU: many, as some end before others, but fewer where each has much to write.
  constexpr int64_t kBlocks = 4096, kBlocksOfOwn = 1024;
  GeneralSplit split{};
  split.learned = extras.grad_parameters != nullptr;
  split.group = extras.parameters && extras.count > 1 ? extras.group : 1;
  split.count = extras.parameters ? extras.count : 1;
  split.rows = extras.rows;
  split.parameters = std::visit([](const auto& of) { return of.kParameters; }, options);
  split.affine = extras.affine;
  split.cells = split.learned ? split.parameters + (extras.affine ? 2 * extras.rows : 0) : 0;
  const int64_t neurons = layout.neurons();
  const bool one = split.count == 1;
  const bool aligned = one || split.group % kPack == 0 || (split.group == 1 && split.count % kPack == 0);
  const bool packs = layout.inner % kPack == 0 && (!extras.lengths || extras.sample % kPack == 0);
  split.pack = packs && aligned && (!extras.affine || extras.rows == 1) ? kPack : 1;
  const auto over = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  split.lanes = kMostThreads;
  split.groups = split.repeats = 1;
  if (!split.learned) return split;
  split.own = !one && split.group == 1 && split.pack > 1;
  if (one) {
    split.columns = over(neurons, int64_t(kMostThreads) * split.pack);
    if (split.columns > kBlocks) split.columns = kBlocks;
    split.group = split.period = split.columns * kMostThreads * split.pack;
  } else {
    split.period = split.group * split.count;
    const int64_t lanes = over(split.period, split.pack);
    split.lanes = int(lanes < kLearningLanes ? lanes : kLearningLanes);
    split.columns = over(split.period, int64_t(split.lanes) * split.pack);
  }
  split.repeats = split.period > 0 ? over(neurons, split.period) : 0;
  const int64_t most = over(split.repeats, kMostThreads / split.lanes);
  if (!one && split.columns > 0) split.groups = over(split.own ? kBlocksOfOwn : kBlocks, split.columns);
  if (split.groups > most) split.groups = most > 0 ? most : 1;
  const int64_t of_block = split.cells * (split.own ? split.pack : 1) * kMostThreads;
  if (of_block * int64_t(sizeof(double)) > kSharedBytes) split.held = of_block * split.columns * split.groups;
  return split;
}

// How many doubles Extras::partial needs, for a call with its pointers but that one.
template <class Scalar>
int64_t general_partial(const Layout& layout, const Extras<state_t<Scalar>>& extras, const NeuronOptions& options) {
  return split_general<Scalar>(layout, extras, options).partial();
}

// For packs at most `widest` wide. Single neurons where there are few, as in plan_lif, and nothing is learned.
template <class Scalar>
GeneralPlan plan_general(const Layout& layout, const Extras<state_t<Scalar>>& extras, const NeuronOptions& options,
                         int widest, const DeviceProperties& device) {
  const GeneralSplit split = split_general<Scalar>(layout, extras, options);
  GeneralPlan plan{};
  static_cast<GeneralSplit&>(plan) = split;
  const int64_t neurons = layout.neurons();
  const bool many = split.learned || neurons / split.pack >= int64_t(device.processors) * 2 * kMostThreads;
  plan.width = many && split.pack <= widest ? split.pack : 1;
  const auto over = [](int64_t a, int64_t b) { return b > 0 ? (a + b - 1) / b : 0; };
  if (!split.learned) {
    plan.thread_rows = 1;
    plan.passes = 1;
    plan.lanes = kMostThreads;
    while (plan.lanes > 32 && over(neurons, plan.width) < int64_t(device.processors) * plan.lanes) plan.lanes /= 2;
    plan.threads = plan.lanes;
    plan.period = neurons;
    plan.blocks = plan.columns = over(neurons, int64_t(plan.lanes) * plan.width);
    return plan;
  }
  // The columns stay as they are: with single neurons their lanes are more, or the repeats.
  if (plan.width < split.pack) {
    plan.own = false;
    if (split.count > 1) {
      plan.lanes *= split.pack;
    } else {
      plan.group = plan.period = plan.columns * kMostThreads;
      plan.repeats = over(neurons, plan.period);
    }
  }
  plan.thread_rows = kMostThreads / plan.lanes;
  if (plan.thread_rows > plan.repeats) plan.thread_rows = plan.repeats > 0 ? int(plan.repeats) : 1;
  plan.threads = plan.lanes * plan.thread_rows;
  plan.passes = over(plan.repeats, plan.groups * plan.thread_rows);
  plan.blocks = plan.columns * plan.groups;
  const int64_t of_block = plan.cells * (plan.own ? plan.width : 1) * plan.threads;
  plan.shared_bytes = split.held > 0 ? 0 : int(of_block * int64_t(sizeof(double)));
  const int64_t in_block = int64_t(plan.lanes) * plan.width;
  const int64_t terms = (over(plan.group, in_block) + 1) * plan.groups;
  plan.team = 1;
  while (plan.team < kMostThreads && plan.team * 4 < terms) plan.team *= 2;
  plan.entry_blocks =
      over((plan.parameters + (plan.affine ? 2 : 0)) * plan.rows * plan.count, kMostThreads / plan.team);
  return plan;
}

// How the neurons with normalisation are shared out among threads. Follows from the shape and the dtype alone, and not
// from the order in memory: sums over features, strips and groups are rounded in this order, so that their bits follow
// from the same.
struct NeuNormSplit {
  int pack;   // neighbouring features, 4 or 1: pack n belongs to team n % teams
  int teams;  // threads that share out the features of a position
  int lanes;  // neighbouring threads of a team where positions are innermost
  int strip;  // neighbouring positions over which the gradients of decays are summed; at most lanes
};

// The neurons that a thread moves at once: neighbours in memory. Either 4 features of a position, where features are
// innermost (packs of 16 bytes, and of 8 of a half type: with 16 it runs short of registers); or 2 positions of a
// feature, for half types; or a single neuron, in either order.
template <int kPositions_, int kFeatures_>
struct Tile {
  static constexpr int kPositions = kPositions_, kFeatures = kFeatures_, kWidth = kPositions * kFeatures;
  // All teams of a position are in one warp, and add up their sums by shuffles. Else in shared memory, with barriers.
  static constexpr bool kInWarp = kFeatures > 1;
  // Prefetch distance, in tiles, while summing. Packs have enough bytes under way without, and no registers to spare.
  static constexpr int kAhead = kFeatures > 1 ? 0 : 2;
};

// How a kernel with normalisation is launched. Teams, lanes and strips are powers of 2.
struct NeuNormPlan : NeuNormSplit {
  int tile_positions, tile_features;      // of the Tile
  int team_bits, lane_bits;               // log2 of teams and lanes
  int rows;                               // of lanes, for all positions
  int64_t strips;                         // for all positions
  int64_t blocks;                         // rows x samples, or rows x groups of them
  int samples, more_samples;              // of a group; groups that have one sample more
  int packs, more_packs;                  // of a team; teams that have one pack more
  int tiles;                              // of a thread, at most
  int shared_bytes;                       // for what waits for a sum over the features; 0 if that is read again
  int64_t to_next_feature, to_next_pack;  // of the same team, in elements of an array like x
  int64_t row, row_bytes, map_row;        // to the next step: of x in elements and bytes, of a map in elements
  double share;                           // of a feature in the map

  STBP_FN int threads() const { return lanes * teams; }
};

constexpr int kNeuNormThreads = 256;  // of the largest block
constexpr int kMostLanes = 32, kMostTeams = 32;

// Static shared memory, in elements of State: a value per thread and step and the parts of their sums, or, where warps
// add up by themselves, a value per thread for the gradients of decays.
template <bool kInWarp>
constexpr int kNeuNormScratch = kInWarp ? kNeuNormThreads : kNeuNormChunk * (kNeuNormThreads + kMostLanes);

// Lanes: up to 32, halved (down to 8, as 8 float32 are a sector of 32 bytes) until a chunk's gradients of a block fit
// into 64 KB: an A100's multiprocessor has room for two such blocks. Teams: what makes 256 threads with them, halved
// where too many would have no pack in the last round. A strip, the block's positions where features are innermost, is
// halved further, until its gradients fit into 64 KB, too.
inline NeuNormSplit split_neunorm(int64_t features, int64_t positions, int scalar_bytes) {
  constexpr int64_t kMostHeld = 64 * 1024;
  const int64_t of_position = features * kNeuNormChunk * scalar_bytes;
  const int64_t of_lane = of_position * (scalar_bytes == 2 ? 2 : 1);  // a pair
  NeuNormSplit split{scalar_bytes < 8 && features % 4 == 0 ? 4 : 1, 1, kMostLanes, 1};
  while (split.lanes > 8 && (of_lane * split.lanes > kMostHeld || split.lanes / 2 >= positions)) split.lanes /= 2;
  split.teams = kNeuNormThreads / split.lanes;
  const int64_t packs = features / split.pack;
  const auto rounded_up = [packs](int teams) { return (packs + teams - 1) / teams * teams; };
  while ((split.teams > 8 && rounded_up(split.teams / 2) <= rounded_up(split.teams) / 8 * 7) ||
         (split.teams > 1 && packs <= split.teams / 2))
    split.teams /= 2;
  // Whole warps, for the shuffles.
  const auto halved = [&split](int& lanes) { return lanes / 2 * split.teams >= 32 ? lanes /= 2, true : false; };
  while (split.lanes / 2 >= positions && halved(split.lanes)) continue;
  while (split.lanes * split.teams < 32) split.lanes *= 2;
  split.strip = split.lanes;
  while (of_position * split.strip > kMostHeld && halved(split.strip)) continue;
  return split;
}

inline int64_t neunorm_strips(int64_t features, int64_t positions, int scalar_bytes) {
  const int strip = split_neunorm(features, positions, scalar_bytes).strip;
  return (positions + strip - 1) / strip;
}

// Enough blocks for any GPU, and the same number on all of them, as the sums over a group are rounded by themselves.
inline int64_t neunorm_groups(int64_t batch, int64_t features, int64_t positions, int scalar_bytes) {
  constexpr int64_t kBlocks = 1024;
  const int lanes = split_neunorm(features, positions, scalar_bytes).lanes;
  const int64_t rows = (positions + lanes - 1) / lanes;
  const int64_t groups = rows > 0 ? (kBlocks + rows - 1) / rows : 1;
  return groups < batch ? groups : batch > 0 ? batch : 1;
}

// For so many groups of samples, packs at most `widest` wide, and so many bytes of each neuron that wait for a sum.
template <class Io>
NeuNormPlan plan_neunorm(const NeuNormSplit& split, const Io& io, int scalar_bytes, int64_t groups, int widest,
                         int held_bytes, const DeviceProperties& device) {
  NeuNormPlan plan{};
  static_cast<NeuNormSplit&>(plan) = split;
  const bool features_innermost = io.channels_last || io.positions == 1;
  plan.tile_features = features_innermost && scalar_bytes < 8 && widest >= 4 ? 4 : 1;
  plan.packs = int(io.features / plan.pack / plan.teams);
  plan.more_packs = int(io.features / plan.pack % plan.teams);
  const int64_t tiles = (plan.packs + int64_t(plan.more_packs > 0)) * plan.pack / plan.tile_features;
  plan.tiles = int(tiles);
  const int scratch = plan.tile_features > 1 ? kNeuNormScratch<true> : kNeuNormScratch<false>;
  const int64_t shared = device.shared_bytes - scratch * (scalar_bytes == 8 ? 8 : 4);
  const auto held = [&] {
    const int64_t threads = (plan.threads() + 31) / 32 * 32;
    return tiles * threads * plan.tile_positions * plan.tile_features * held_bytes;
  };
  // Pairs, unless what waits for them does not fit, and for single neurons does.
  plan.tile_positions = !features_innermost && scalar_bytes < 4 && widest >= 2 ? 2 : 1;
  if (plan.tile_positions > 1 && held() > shared && held() / 2 <= shared) plan.tile_positions = 1;
  plan.strips = (io.positions + plan.strip - 1) / plan.strip;
  if (plan.tile_features > 1) plan.lanes = plan.strip;
  // Pairs of all positions may need but half the lanes.
  if (plan.tile_positions > 1 && plan.strip > 1 && io.positions <= plan.strip) plan.lanes = plan.strip / 2;
  while (1 << plan.team_bits < plan.teams) ++plan.team_bits;
  while (1 << plan.lane_bits < plan.lanes) ++plan.lane_bits;
  const int64_t of_row = int64_t(plan.lanes) * plan.tile_positions, rows = (io.positions + of_row - 1) / of_row;
  plan.rows = int(rows);
  plan.blocks = rows * groups;
  plan.samples = int(io.batch / groups);
  plan.more_samples = int(io.batch % groups);
  plan.shared_bytes = held() <= shared ? int(held()) : 0;
  plan.to_next_feature = io.channels_last ? 1 : io.positions;
  plan.to_next_pack = plan.to_next_feature * (plan.tile_features > 1 ? plan.teams * plan.pack  // from a pack's first
                                                                     : (plan.teams - 1) * plan.pack + 1);  // or last
  plan.map_row = io.batch * io.positions;
  plan.row = plan.map_row * io.features;
  plan.row_bytes = plan.row * scalar_bytes;
  plan.share = neunorm_share(io);
  return plan;
}

// Forward a byte waits for each neuron, with a bit for the spike of each step of a chunk; backward the chunk's
// gradients.
template <class Scalar>
NeuNormPlan plan_neunorm(const NeuNormSplit& split, const NeuNormForward<Scalar>& io, int widest,
                         const DeviceProperties& device) {
  return plan_neunorm(split, io, sizeof(Scalar), io.batch, widest, 1, device);
}
template <class Scalar>
NeuNormPlan plan_neunorm(const NeuNormSplit& split, const NeuNormBackward<Scalar>& io, int widest,
                         const DeviceProperties& device) {
  return plan_neunorm(split, io, sizeof(Scalar), io.groups, widest, kNeuNormChunk * int(sizeof(Scalar)), device);
}

}  // namespace stbp::cuda
