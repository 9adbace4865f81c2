// How the CUDA kernels are launched: pure functions of a call and a GPU, which the tests run on a CPU, and whose
// results the kernels are given by value.
#pragma once

#include <cstdint>

#include "../core/io.h"
#include "../core/neunorm.h"
#include "../core/number.h"
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
