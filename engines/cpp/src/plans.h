// TensorRT engines of a model and the records beside them: which plan fits, and why the others do not
// (higen/backends/plans.py). It only compares values and needs no TensorRT and no GPU.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bundle.h"
#include "errors.h"
#include "stages.h"
#include "tensor.h"

namespace higen::core {

// An input or output of a plan; -1 is an axis that the profiles limit.
struct PlanTensor {
    std::string name;
    bool is_input = true;
    std::string dtype;  // numpy's name: "float32"
    Shape shape;
};

// The shapes that a profile allows for an input, and the shape that it is tuned for.
struct Span {
    std::string name;
    Shape smallest, best, largest;

    [[nodiscard]] bool holds(const Shape& shape) const;
};

using Shapes = std::map<std::string, Shape, std::less<>>;

// A named set of shapes, one span for each input.
struct PlanProfile {
    std::string name;
    std::vector<Span> spans;

    // Whether all inputs are inside it.
    [[nodiscard]] bool holds(const Shapes& shapes) const;
    // The number of elements of all inputs at their largest sizes.
    [[nodiscard]] double volume() const;
};

// What is known of a plan without opening it: see PlanRecord in higen/backends/plans.py.
struct PlanRecord {
    std::string stage, target, precision, flavour, library;
    std::vector<std::int64_t> architectures;  // compute capabilities, 89 for SM89
    std::string graph, graph_sha256, weights, weights_sha256;
    std::vector<PlanTensor> tensors;
    std::vector<PlanProfile> profiles;
    bool weight_streaming = false;
    std::int64_t size = 0;
    std::string sha256;
    std::string built;
    double seconds = 0;
};

// Read a stored record, checking every key and type. Throws EngineError (malformed).
[[nodiscard]] PlanRecord parse_record(std::string_view json, const std::string& where);

struct Plan {
    std::filesystem::path path;
    PlanRecord record;

    // Target and stage, for messages.
    [[nodiscard]] std::string name() const { return record.target + "/" + record.stage; }
    // The command that builds it again; the caller may add profiles.
    [[nodiscard]] std::string remedy() const;
};

// The plans of a stage over all targets of a model directory, and what is wrong with records that cannot be read.
//
// A new plan is moved into place right before its record. Between the two moves, also after a kill there, the waiting
// record belongs to the plan and is used.
[[nodiscard]] std::pair<std::vector<Plan>, std::vector<EngineError>> read_plans(const std::filesystem::path& model,
                                                                                const std::string& stage);

// The version of each installed flavour of TensorRT ("rtx", "tensorrt").
using Libraries = std::map<std::string, std::string, std::less<>>;

// Check that a plan fits the model's files, this GPU and this TensorRT. Throws EngineError (wrong architecture, stale,
// missing library).
void check_plan(const Plan& plan, const Files& files, std::int64_t architecture, const Libraries& libraries);

// The plans of a stage that fit, the best first: a plan for only this GPU before a portable one, classic TensorRT
// before RTX. `plans` and `errors` come from `read_plans`. Throws an unavailable error if there is no engine at all,
// and the error of the most likely engine if none fits.
[[nodiscard]] std::vector<Plan> fitting_plans(const std::string& stage, const std::vector<Plan>& plans,
                                              const std::vector<EngineError>& errors, const Files& files,
                                              std::int64_t architecture, const Libraries& libraries);

// The plans in a precision or in one that stands in for it; for "", all plans.
[[nodiscard]] std::vector<Plan> in_precision(std::vector<Plan> plans, std::string_view precision);

// Check that a plan's tensors are those of its record and of the stage table, in types that this library knows. The
// record has the network's shapes. In an engine, an axis that its profiles fix may have a size instead of -1. Throws
// EngineError (malformed).
void check_interface(const Plan& plan, const Stage& stage, const std::vector<PlanTensor>& tensors);

// Index of the narrowest profile that allows all inputs' shapes. Throws EngineError (outside profile) that names what
// does not fit.
[[nodiscard]] std::size_t best_profile(const Plan& plan, const Shapes& shapes);

// Bytes of weights to keep on the GPU, for an engine that can stream them. All, if they and the activations leave a
// tenth of the free memory; else TensorRT's proposal (`automatic`).
[[nodiscard]] std::int64_t streaming_budget(std::int64_t streamable, std::int64_t activations, std::int64_t free,
                                            std::int64_t automatic);

// Why TensorRT for RTX calls a plan invalid: the bits of EngineInvalidityDiagnostics.
enum InvalidityBit : std::uint64_t {
    version_mismatch = 1,
    unsupported_architecture = 2,
    old_cuda_driver = 4,
    old_cuda_runtime = 8,
    insufficient_gpu_memory = 16,
    malformed_engine = 32,
    cuda_error = 64,
};

[[nodiscard]] EngineError validity_error(const Plan& plan, std::uint64_t reasons);

}  // namespace higen::core
