#include "prompt_chunks.h"

#include <algorithm>

#include "errors.h"

namespace higen::core {
namespace {

// A full chunk ends at its last comma if that is at most this many tokens back.
constexpr std::size_t near = 20;

double mean(const std::vector<float>& values) {
    double sum = 0.0;
    for (const auto value : values) sum += value;
    return sum / static_cast<double>(values.size());
}

}  // namespace

bool Chunks::add(std::int64_t id, double weight) {
    if (closed_ || (rows_.size() == most_ && rows_.back().size() == room_)) return false;
    const auto filled = rows_.back().size();
    if (comma_ && id == *comma_) {
        last_comma_ = filled;
    } else if (filled == room_ && last_comma_ && filled - *last_comma_ <= near) {
        auto& row = rows_.back();
        const auto from = row.begin() + static_cast<std::ptrdiff_t>(*last_comma_ + 1);
        Row moved(from, row.end());
        row.erase(from, row.end());
        begin();
        rows_.back() = std::move(moved);
    }
    if (rows_.back().size() == room_) begin();
    rows_.back().emplace_back(id, weight);
    return true;
}

void Chunks::begin() {
    last_comma_.reset();
    if (rows_.size() == most_)
        closed_ = true;
    else
        rows_.emplace_back();
}

Reading Chunks::reading(std::int64_t start, std::int64_t end, std::int64_t pad) const {
    const auto count = rows_.size() - (rows_.size() > 1 && rows_.back().empty() ? 1 : 0);
    Reading made;
    for (std::size_t i = 0; i < count; ++i) {
        const auto whole = (i + 1) * (room_ + 2);
        made.ids.push_back(start);
        made.weights.push_back(1.0F);
        for (const auto& [id, weight] : rows_[i]) {
            made.ids.push_back(id);
            made.weights.push_back(static_cast<float>(weight));
        }
        made.ids.push_back(end);
        made.ids.resize(whole, pad);
        made.weights.resize(whole, 1.0F);
    }
    return made;
}

void apply_weights(Array& hidden, const float* weights) {
    const auto tokens = static_cast<std::size_t>(hidden.shape[1]), width = static_cast<std::size_t>(hidden.shape[2]);
    if (std::all_of(weights, weights + tokens, [](float weight) { return weight == 1.0F; })) return;
    auto& values = std::get<0>(hidden.values);
    const auto before = mean(values);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] *= weights[i / width];
    const auto after = mean(values);
    if (after == 0.0)
        fail_request("prompt: the weights of its words give an embedding with mean 0; change one of the weights");
    const auto scale = static_cast<float>(before / after);
    for (auto& value : values) value *= scale;
}

}  // namespace higen::core
