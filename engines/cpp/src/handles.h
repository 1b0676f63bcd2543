// What the handles of the C interface stand for. A handle is a number that is never reused. So closed and invalid
// handles are detected, and no call can reach freed memory.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <filesystem>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "bundle.h"
#include "higen/higen.h"
#include "pipeline.h"
#include "router.h"
#include "tokenizer.h"

namespace higen::c_api {

// Generations that are stopped together: all of one model, or all with the same token.
class Stoppable {
public:
    // Stop the generations that run now.
    void stop();
    // Stop the generations that run now, and each later one when it begins.
    void stop_for_good(const char* why);

    // While this lives, a generation belongs to the group.
    class Member {
    public:
        Member(Stoppable& group, core::Cancellation& cancellation);
        ~Member();
        Member(const Member&) = delete;
        Member& operator=(const Member&) = delete;

    private:
        Stoppable& group_;
        std::list<core::Cancellation*>::iterator place_;
    };

private:
    std::mutex mutex_;
    std::list<core::Cancellation*> running_;
    const char* why_ = nullptr;  // not null: stopped for good
};

// An opened model.
struct OpenModel {
    core::Bundle bundle;
    std::optional<core::Tokenizer> tokenizer;  // none if the model reads no text
    std::unique_ptr<core::Router> router;
    core::Pipeline pipeline;
    mutable std::mutex mutex;
    mutable std::set<std::string> reports;                    // the texts handed out
    std::vector<std::vector<const char*>> solvers, choices;  // per loop and per control, for the C interface
    std::vector<std::vector<std::int32_t>> preset_steps;      // per preset and loop, for the C interface
    std::vector<std::vector<double>> preset_guidance;

    OpenModel(const std::filesystem::path& path, const core::BackendOptions& options);

    [[nodiscard]] const core::Manifest& manifest() const { return bundle.manifest(); }
    [[nodiscard]] const core::Tokenizer* reader() const { return tokenizer ? &*tokenizer : nullptr; }

    // What runs each stage at present. The text lives as long as the model.
    [[nodiscard]] const char* report() const;
};

// What a model's handle stands for, until the model is closed and its last call has ended.
struct ModelEntry {
    Stoppable running;
    std::mutex mutex;
    std::condition_variable idle;
    std::size_t calls = 0;
    bool closed = false;
    std::unique_ptr<OpenModel> model;
};

[[nodiscard]] higen_model* add_model(std::unique_ptr<OpenModel> model);

// Stop the generations of a model, wait for its calls, and free it. Inside a call (in a callback) it does not wait: the
// last call to end frees the model. An unknown handle is ignored.
void close_model(higen_model* handle);

// A call on an open model. The model is not freed while this lives. Throws a request error for a null pointer and
// HIGEN_ERROR_CLOSED for a closed model.
class Call {
public:
    explicit Call(const higen_model* handle);
    ~Call();
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    [[nodiscard]] OpenModel& model() const { return *entry_->model; }
    [[nodiscard]] Stoppable& running() const { return entry_->running; }

private:
    std::shared_ptr<ModelEntry> entry_;
};

[[nodiscard]] higen_token* add_token();
void free_token(higen_token* handle);
// What a token stands for. Throws a request error for a null pointer and HIGEN_ERROR_CLOSED for a freed token.
[[nodiscard]] std::shared_ptr<Stoppable> find_token(const higen_token* handle);

}  // namespace higen::c_api
