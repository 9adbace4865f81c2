// The CPU kernels of neurons with normalisation: a part of kernels_impl.h.
//
// A thread has a strip of positions of a sample, and all features. Of these it keeps in its scratch memory, which stays
// in the L2 cache, what goes from step to step, and the rest of the input is read in the order in which it lies: rows
// of different steps often lie a multiple of 4 KB apart and would crowd each other out.

#include <cstdlib>
#include <new>

namespace stbp::cpu::STBP_ISA {
namespace {

// A strip of whole vectors of positions.
template <class State>
struct Strip {
  using Value = Vector<State>;
  static constexpr int kLanes = kVectorBytes / sizeof(State);
  static constexpr int kWidth = kNeuNormStrip / kVectorBytes;

  int vectors;
  bool past_caches;  // write results there

  STBP_FN int width() const { return vectors; }
  template <class T>
  STBP_FN Value get(const T* row, int i) const {
    return widen(load<decltype(narrow(Value(), T()))>(row + i * kLanes), T());
  }
  template <class T>
  STBP_FN void set(T* row, int i, Value value) const {
    const auto stored = narrow(value, T());
    memcpy(row + i * kLanes, &stored, sizeof(stored));
  }
  template <class T>
  STBP_FN void set_result(T* row, int i, Value value) const {
    if (past_caches) {
      stream(row + i * kLanes, narrow(value, T()));
    } else {
      set(row, i, value);
    }
  }
  // What will be wanted some rows later: those of a strip are shorter than what the hardware foresees.
  template <class T>
  STBP_FN void prefetch(const T* row, int i, int64_t positions) const {
    const int rows = vectors < kWidth / 4 ? kWidth / vectors : 4;
    __builtin_prefetch(row + i * kLanes + rows * positions);
  }
  STBP_FN State total(const Value* values) const {
    State sum = 0;
    for (int i = 0; i < vectors; ++i)
      for (int lane = 0; lane < kLanes; ++lane) sum += values[i][lane];
    return sum;
  }
};

// The positions that are left, fewer than a vector has. What lies beyond is 0, and adds nothing to a gradient.
template <class State>
struct Rest {
  using Value = Vector<State>;
  static constexpr int kWidth = 1;

  Remainder<State> lanes;

  STBP_FN int width() const { return 1; }
  template <class T>
  STBP_FN Value get(const T* row, int i) const {
    return lanes.read(row).get(i);
  }
  template <class T>
  STBP_FN void set(T* row, int i, Value value) const {
    lanes.write(row).set(i, value);
  }
  template <class T>
  STBP_FN void set_result(T* row, int i, Value value) const {
    set(row, i, value);
  }
  template <class T>
  STBP_FN void prefetch(const T*, int, int64_t) const {}
  STBP_FN State total(const Value* values) const {
    State sum = 0;
    for (int lane = 0; lane < lanes.count; ++lane) sum += values[0][lane];
    return sum;
  }
};

// Rows of all features of a strip: row(k, c) is an array of the strip's Values.
template <class Value>
struct Rows {
  Value* at;
  int64_t features;
  int width;

  STBP_FN Value* row(int64_t k, int64_t c) const { return at + (k * features + c) * width; }
  STBP_FN void clear() const {
    for (int64_t i = 0; i < features * width; ++i) at[i] = Value{};
  }
};

template <class Lanes, class State, class Value = typename Lanes::Value>
STBP_FN void load_weight(const Lanes& lanes, const State* weight, int64_t positions, const Rows<Value>& rows) {
  for (int64_t c = 0; c < rows.features; ++c)
    for (int i = 0; i < rows.width; ++i) rows.row(0, c)[i] = lanes.get(weight + c * positions, i);
}

// A sum over the features, in four parts, as each addition waits for the one before.
template <class Lanes, class Value = typename Lanes::Value>
struct FeatureSum {
  Value part[4][Lanes::kWidth] = {};

  STBP_FN void add(int64_t c, int i, Value value) { part[c % 4][i] = part[c % 4][i] + value; }
  STBP_FN Value total(int i) const { return (part[0][i] + part[1][i]) + (part[2][i] + part[3][i]); }
};

// Memory of this thread, kept from call to call: its page faults would cost more than the kernel.
inline void* scratch_memory(size_t bytes) {
  struct Memory {
    void* at = nullptr;
    size_t bytes = 0;
    ~Memory() { std::free(at); }
  };
  static thread_local Memory memory;
  if (memory.bytes < bytes) {
    std::free(memory.at);
    memory.bytes = 0;
    memory.at = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory.at == nullptr) throw std::bad_alloc();
    memory.bytes = bytes;
  }
  return memory.at;
}

template <class Lanes, class Neuron, class Scalar>
STBP_FN void neunorm_forward_scan(const Lanes& lanes, Neuron neuron, const NeuNormForward<Scalar>& io, int64_t sample,
                                  int64_t first) {
  using Value = typename Lanes::Value;
  using State = typename Neuron::State;
  if (io.decays) neuron.c.decay = io.decays[0];
  const NeuNormConstants<State> norm(io);
  const NeuNormPlace at(io, sample, first);
  const int width = lanes.width();
  const int64_t features = io.features;
  Value* const scratch = static_cast<Value*>(scratch_memory(kNeuNormForwardRows * features * width * sizeof(Value)));
  const Rows<Value> weight{scratch, features, width};
  const Rows<Value> v{weight.row(1, 0), features, width}, spikes{weight.row(2, 0), features, width};
  load_weight(lanes, io.weight + first, io.positions, weight);
  v.clear();
  Value a[Lanes::kWidth] = {};

  for (int64_t t = 0; t < io.steps; ++t) {
    const bool keeps = (t + 1) % kNeuNormChunk == 0 && t + 1 < io.steps;
    FeatureSum<Lanes> sum;
    for (int64_t c = 0; c < features; ++c) {
      const Scalar* const x = io.x + at.neuron(t, c);
      for (int i = 0; i < width; ++i) {
        Value spike;
        neuron.step(v.row(0, c)[i], lanes.get(x, i), spike);
        spikes.row(0, c)[i] = spike;
        sum.add(c, i, spike);
        lanes.prefetch(x, i, io.positions);
        if (keeps) lanes.set(io.states + at.neuron(t / kNeuNormChunk, c), i, v.row(0, c)[i]);
      }
    }
    for (int i = 0; i < width; ++i) {
      a[i] = norm.decay * a[i] + norm.gain * sum.total(i);
      lanes.set(io.sums + at.map(t), i, sum.total(i));
      lanes.set(io.maps + at.map(t), i, a[i]);
    }
    for (int64_t c = 0; c < features; ++c) {
      for (int i = 0; i < width; ++i)
        lanes.set_result(io.normalised + at.neuron(t, c), i, spikes.row(0, c)[i] - weight.row(0, c)[i] * a[i]);
    }
  }
}

// All samples of a group; leaves the sums over them in grad_weight and in slot `strip` of grad_decays.
template <class Lanes, class Neuron, class Scalar>
STBP_FN void neunorm_backward_scan(const Lanes& lanes, Neuron neuron, const NeuNormBackward<Scalar>& io, int64_t group,
                                   int64_t strip, int64_t strips, int64_t first) {
  using Value = typename Lanes::Value;
  using State = typename Neuron::State;
  if (io.decays) neuron.c.decay = io.decays[0];
  const NeuNormConstants<State> norm(io);
  const int width = lanes.width();
  const int64_t features = io.features;
  const int64_t most = io.steps < kNeuNormChunk ? io.steps : kNeuNormChunk;
  const int64_t rows = neunorm_backward_rows(io.steps, io.grad_decays != nullptr);
  Value* const scratch = static_cast<Value*>(scratch_memory(rows * features * width * sizeof(Value)));
  const Rows<Value> weight{scratch, features, width}, grad_weight{weight.row(1, 0), features, width};
  const Rows<Value> v{weight.row(2, 0), features, width}, grad_v{weight.row(3, 0), features, width};
  const Rows<Value> u{weight.row(4, 0), features, width};
  const Rows<Value> before{u.row(most, 0), features, width};  // v of the step before, if decays are learned
  load_weight(lanes, io.weight + first, io.positions, weight);
  grad_weight.clear();
  Value grad_decay[Lanes::kWidth] = {}, grad_norm_decay[Lanes::kWidth] = {};

  const int64_t from = io.batch * group / io.groups, to = io.batch * (group + 1) / io.groups;
  for (int64_t sample = from; sample < to; ++sample) {
    const NeuNormPlace at(io, sample, first);
    Value carried[Lanes::kWidth] = {};  // norm_decay A[t+1]
    grad_v.clear();
    for (int64_t chunk = (io.steps - 1) / kNeuNormChunk; chunk >= 0; --chunk) {
      const int64_t start = chunk * kNeuNormChunk;
      const int steps = int(io.steps - start < kNeuNormChunk ? io.steps - start : kNeuNormChunk);
      if (chunk == 0) v.clear();
      for (int k = 0; k < steps; ++k) {
        for (int64_t c = 0; c < features; ++c) {
          const Scalar* const x = io.x + at.neuron(start + k, c);
          for (int i = 0; i < width; ++i) {
            if (k == 0 && chunk > 0) v.row(0, c)[i] = lanes.get(io.states + at.neuron(chunk - 1, c), i);
            if (io.grad_decays) before.row(k, c)[i] = v.row(0, c)[i];
            Value unused;
            u.row(k, c)[i] = neuron.step(v.row(0, c)[i], lanes.get(x, i), unused);
            lanes.prefetch(x, i, io.positions);
          }
        }
      }
      for (int k = steps - 1; k >= 0; --k) {
        const int64_t t = start + k;
        FeatureSum<Lanes> sum;
        Value map[Lanes::kWidth], grad_spike[Lanes::kWidth];
        for (int64_t c = 0; c < features; ++c) {
          const Scalar* const grad = io.grad_normalised + at.neuron(t, c);
          for (int i = 0; i < width; ++i) {
            sum.add(c, i, weight.row(0, c)[i] * lanes.get(grad, i));
            lanes.prefetch(grad, i, io.positions);
          }
        }
        for (int i = 0; i < width; ++i) {
          map[i] = lanes.get(io.maps + at.map(t), i);
          const Value grad_a = carried[i] - sum.total(i);
          grad_spike[i] = norm.gain * grad_a;
          carried[i] = norm.decay * grad_a;
          if (io.grad_decays) {
            const Value map_before = t > 0 ? lanes.get(io.maps + at.map(t - 1), i) : Value{};
            const Value slope = map_before - lanes.get(io.sums + at.map(t), i) * norm.share;
            grad_norm_decay[i] = grad_norm_decay[i] + grad_a * slope;
          }
        }
        for (int64_t c = 0; c < features; ++c) {
          for (int i = 0; i < width; ++i) {
            const Value upstream = lanes.get(io.grad_normalised + at.neuron(t, c), i);
            grad_weight.row(0, c)[i] = grad_weight.row(0, c)[i] - upstream * map[i];
            const Value grad_u = neuron.step_back(u.row(k, c)[i], upstream + grad_spike[i], grad_v.row(0, c)[i]);
            if (io.grad_decays) grad_decay[i] = grad_decay[i] + grad_u * before.row(k, c)[i];
            lanes.set_result(io.grad_x + at.neuron(t, c), i, grad_u);
          }
        }
      }
    }
  }
  const NeuNormPlace at(io, from, first);
  for (int64_t c = 0; c < features; ++c)
    for (int i = 0; i < width; ++i) lanes.set(io.grad_weight + at.weight(group, c), i, grad_weight.row(0, c)[i]);
  if (io.grad_decays) {
    State* const slot = io.grad_decays + (group * strips + strip) * 2;
    slot[0] = lanes.total(grad_decay);
    slot[1] = lanes.total(grad_norm_decay);
  }
}

// scan(lanes, sample or group, strip, n) of every task in [first, last).
template <class State, class Scan>
STBP_FN void each_strip(const NeuNormPlan& plan, int64_t positions, int64_t first, int64_t last, bool past_caches,
                        const Scan& scan) {
  constexpr int kLanes = Strip<State>::kLanes;
  const int64_t in_vectors = positions / kLanes * kLanes;
  for (int64_t task = first; task < last; ++task) {
    const int64_t part = task / plan.strips, strip = task % plan.strips;
    if (strip < plan.whole) {
      const int64_t n = strip * plan.length, left = in_vectors - n;
      scan(Strip<State>{int((plan.length < left ? plan.length : left) / kLanes), past_caches}, part, strip, n);
    } else {
      scan(Rest<State>{{int(positions - in_vectors)}}, part, strip, in_vectors);
    }
  }
}

template <class Scalar>
void neunorm_forward(const NeuNormForward<Scalar>& io, const LifOptions& options, const NeuNormPlan& plan,
                     int64_t first, int64_t last, bool past_caches) {
  visit_forward_neuron<Scalar>(options, [&](const auto& neuron) {
    each_strip<state_t<Scalar>>(plan, io.positions, first, last, past_caches,
                                [&](const auto& lanes, int64_t sample, int64_t, int64_t n) {
                                  neunorm_forward_scan(lanes, neuron, io, sample, n);
                                });
  });
  if (past_caches) end_of_streams();
}

template <class Scalar>
void neunorm_backward(const NeuNormBackward<Scalar>& io, const LifOptions& options, const NeuNormPlan& plan,
                      int64_t first, int64_t last, bool past_caches) {
  visit_backward_neuron<Scalar>(options, [&](const auto& neuron) {
    each_strip<state_t<Scalar>>(plan, io.positions, first, last, past_caches,
                                [&](const auto& lanes, int64_t group, int64_t strip, int64_t n) {
                                  neunorm_backward_scan(lanes, neuron, io, group, strip, plan.strips, n);
                                });
  });
  if (past_caches) end_of_streams();
}

}  // namespace
}  // namespace stbp::cpu::STBP_ISA
