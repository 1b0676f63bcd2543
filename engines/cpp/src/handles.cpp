#include "handles.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <utility>

#include "errors.h"

namespace higen::c_api {
namespace {

// The open handles, by number. It lives until the process ends, because calls may come from any thread at any time.
template <typename Handle, typename T>
class Table {
public:
    Handle* add(std::shared_ptr<T> value) {
        const std::lock_guard lock(mutex_);
        known_.emplace(++last_, std::move(value));
        return reinterpret_cast<Handle*>(last_);
    }

    // A null pointer for an unknown handle.
    std::shared_ptr<T> find(const Handle* handle) {
        const std::lock_guard lock(mutex_);
        const auto found = known_.find(reinterpret_cast<std::uintptr_t>(handle));
        return found == known_.end() ? nullptr : found->second;
    }

    std::shared_ptr<T> take(const Handle* handle) {
        const std::lock_guard lock(mutex_);
        const auto found = known_.find(reinterpret_cast<std::uintptr_t>(handle));
        if (found == known_.end()) return nullptr;
        auto value = std::move(found->second);
        known_.erase(found);
        return value;
    }

private:
    std::mutex mutex_;
    std::uintptr_t last_ = 0;
    std::map<std::uintptr_t, std::shared_ptr<T>> known_;
};

Table<higen_model, ModelEntry>& models() {
    static auto& table = *new Table<higen_model, ModelEntry>();
    return table;
}

Table<higen_token, Stoppable>& tokens() {
    static auto& table = *new Table<higen_token, Stoppable>();
    return table;
}

thread_local std::size_t calls_of_this_thread = 0;

[[noreturn]] void fail_closed(const char* what) { throw core::Error(HIGEN_ERROR_CLOSED, what); }

constexpr const char* closed_model = "the model was closed, or does not come from this library";

}  // namespace

void Stoppable::stop() {
    const std::lock_guard lock(mutex_);
    for (auto* cancellation : running_) cancellation->cancel("cancelled");
}

void Stoppable::stop_for_good(const char* why) {
    const std::lock_guard lock(mutex_);
    why_ = why;
    for (auto* cancellation : running_) cancellation->cancel(why);
}

Stoppable::Member::Member(Stoppable& group, core::Cancellation& cancellation) : group_(group) {
    const std::lock_guard lock(group_.mutex_);
    place_ = group_.running_.insert(group_.running_.end(), &cancellation);
    if (group_.why_ != nullptr) cancellation.cancel(group_.why_);
}

Stoppable::Member::~Member() {
    const std::lock_guard lock(group_.mutex_);
    group_.running_.erase(place_);
}

OpenModel::OpenModel(const std::filesystem::path& path, const core::BackendOptions& options)
    : bundle(path, options.verify),
      router(core::make_router(bundle, options)),
      pipeline(bundle.manifest(), *router) {
    if (const auto& text = manifest().text)
        tokenizer.emplace(core::read_file(bundle.file(text->tokenizer)),
                          (path / std::filesystem::u8path(text->tokenizer)).u8string(), *text);
    for (const auto& loop : manifest().loops) {
        auto& names = solvers.emplace_back();
        for (const auto& solver : loop.solvers) names.push_back(solver.name.c_str());
    }
    for (const auto& control : manifest().controls) {
        auto& texts = choices.emplace_back();
        for (const auto& choice : control.choices) texts.push_back(choice.c_str());
    }
    for (const auto& preset : manifest().presets) {
        auto& steps = preset_steps.emplace_back();
        for (const auto& count : preset.steps)
            steps.push_back(static_cast<std::int32_t>(std::min<std::int64_t>(count.value_or(0), INT32_MAX)));
        auto& guidance = preset_guidance.emplace_back();
        for (const auto& scale : preset.guidance) guidance.push_back(scale.value_or(-1.0));
    }
    pipeline.prepare();
}

const char* OpenModel::report() const {
    const std::lock_guard lock(mutex);
    return reports.insert(router->report()).first->c_str();
}

higen_model* add_model(std::unique_ptr<OpenModel> model) {
    auto entry = std::make_shared<ModelEntry>();
    entry->model = std::move(model);
    return models().add(std::move(entry));
}

void close_model(higen_model* handle) {
    const auto entry = models().take(handle);
    if (!entry) return;
    entry->running.stop_for_good("cancelled: the model was closed");
    std::unique_lock lock(entry->mutex);
    entry->closed = true;
    if (entry->calls == 0)
        entry->model.reset();
    else if (calls_of_this_thread == 0)  // a callback would wait for itself, or two callbacks for each other
        entry->idle.wait(lock, [&] { return entry->calls == 0; });
}

Call::Call(const higen_model* handle) : entry_(models().find(handle)) {
    if (handle == nullptr) core::fail_request("model is NULL");
    if (!entry_) fail_closed(closed_model);
    const std::lock_guard lock(entry_->mutex);
    if (entry_->closed) fail_closed(closed_model);
    ++entry_->calls;
    ++calls_of_this_thread;
}

Call::~Call() {
    const std::lock_guard lock(entry_->mutex);
    --calls_of_this_thread;
    if (--entry_->calls > 0 || !entry_->closed) return;
    entry_->model.reset();
    entry_->idle.notify_all();
}

higen_token* add_token() { return tokens().add(std::make_shared<Stoppable>()); }

void free_token(higen_token* handle) { (void)tokens().take(handle); }

std::shared_ptr<Stoppable> find_token(const higen_token* handle) {
    if (handle == nullptr) core::fail_request("token is NULL");
    auto found = tokens().find(handle);
    if (!found) fail_closed("the token was freed, or does not come from this library");
    return found;
}

}  // namespace higen::c_api
