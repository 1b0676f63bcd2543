#include "feature_reuse.h"

#include "errors.h"

namespace higen::core {

const Stage& FeatureReuse::step(const ReuseStages& stages, std::size_t row) {
    shallow_ = row % every_ != 0 && stages.full == kind_;
    kind_ = stages.full;
    now_ = shallow_ ? stages.shallow : stages.full;
    part_ = 0;
    if (!shallow_) kept_.clear();
    return *now_;
}

Tensors FeatureReuse::run(const Stage&, const Tensors& inputs, Cancellation& cancellation) {
    if (shallow_) {
        auto given = inputs;
        given.insert_or_assign(deep_features, kept_.at(part_++));
        return backend_.run(*now_, given, cancellation);
    }
    auto outputs = backend_.run(*now_, inputs, cancellation);
    const auto features = outputs.find(deep_features);
    if (features == outputs.end()) fail_backend(now_->name + " gave no " + deep_features);
    kept_.push_back(features->second);
    outputs.erase(features);
    return outputs;
}

}  // namespace higen::core
