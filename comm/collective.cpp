#include "comm/collective.h"

#include <algorithm>

#include "kernels/device_memory.h"

namespace perseid::comm {
namespace {

constexpr int kLayerMax = 65534;

bool has_gpu() {
  static const bool has = kernels::device_count() > 0;
  return has;
}

// "argument=value limit" of an error that is no disagreement: CUDA's.
TransferResult broken_by(const Error& error) {
  const ErrorDetail& detail = error.detail();
  TransferResult result;
  result.state = TransferResult::State::kBroken;
  result.text = detail.argument + "=" + detail.value + " " + detail.limit;
  return result;
}

}  // namespace

std::string list_text(const std::vector<int>& ranks) {
  constexpr size_t kShown = 8;
  std::string text;
  for (size_t i = 0; i < ranks.size() && i < kShown; ++i) {
    text += (i == 0 ? "" : ", ") + to_text(ranks[i]);
  }
  return ranks.size() <= kShown ? text : text + ", ... (" + to_text(ranks.size()) + " ranks)";
}

Collective::Collective(const Group& group, OpCode op, const CallSite& site)
    : backend_(group.backend()), op_(op), site_(site) {
  const GroupState& state = backend_.state();
  if (state.is_failed) {
    ErrorDetail detail = detail_of(site_, op_, rank());
    detail.argument = "group";
    detail.value = "failed";
    detail.limit =
        "by an earlier error: " + state.failed_text + "; restart from the last checkpoint";
    detail.culprit = state.failed_culprit;
    if (state.is_failed_by_peer) throw PeerLost(std::move(detail));
    throw RanksDisagree(std::move(detail));
  }
  const bool has_layer = site.layer >= 0 && site.layer <= kLayerMax;
  header_.sequence = backend_.state().sequence++;
  header_.step = static_cast<uint32_t>(site.step);
  header_.op = static_cast<uint8_t>(op);
  header_.layer = has_layer ? static_cast<uint16_t>(site.layer) : uint16_t{0xFFFF};
  header_.config_hash = state.config_hash;
  refuse_unless(site.layer == -1 || has_layer, Code::kLayer, site.layer);
}

void Collective::refuse(Code code, int64_t a, int64_t b) {
  if (refusal_.code != Code::kGo) return;
  refusal_.code = code;
  refusal_.culprit = rank();
  refusal_.reporter = rank();
  refusal_.a = a;
  refusal_.b = b;
}

void Collective::set_stream(const kernels::Stream& stream) {
  stream_ = stream;
  if (!is_on_device()) return;
  header_.dtype |= kDeviceBit;
  refuse_unless(has_gpu(), Code::kDevice, 0);
}

void Collective::reserve_device(int64_t send_bytes, int64_t recv_bytes) {
  if (!is_on_device()) return;
  allocate(std::max(send_bytes, recv_bytes),
           [&] { backend_.reserve_device(send_bytes, recv_bytes); });
}

void Collective::set_rows(const std::vector<int64_t>& send_rows,
                          const std::vector<int64_t>& recv_rows) {
  send_rows_ = &send_rows;
  recv_rows_ = &recv_rows;
}

std::vector<PeerBlock>& Collective::clear_blocks() {
  std::vector<PeerBlock>& blocks = backend_.state().blocks;
  blocks.assign(static_cast<size_t>(size()), PeerBlock{});
  return blocks;
}

// ---- agreeing ----------------------------------------------------------------------------------
void Collective::agree() {
  GroupState& state = backend_.state();
  deadline_ = Clock::now() + std::chrono::milliseconds(state.timeout_ms);
  if (size() == 1) {
    if (refusal_.code == Code::kGo) return;
    throw_verdict(refusal_, detail_of(site_, op_, rank()), 1, {}, {});
  }
  const Verdict verdict = exchange_verdicts(exchange_headers());
  if (verdict.code == Code::kGo) return;
  try {
    throw_verdict(verdict, detail_of(site_, op_, rank()), size(), headers_, state.received);
  } catch (const Error& error) {
    if (verdict.is_order_broken) fail(error.what(), false, verdict.culprit);
    throw;
  }
}

// The state's two message buffers hold headers first, then verdicts.
void Collective::exchange_words() {
  GroupState& state = backend_.state();
  std::vector<PeerBlock>& blocks = clear_blocks();
  for (size_t p = 0; p < blocks.size(); ++p) {
    blocks[p] = PeerBlock{&state.sent[p], 1, &state.received[p], 1};
  }
  const TransferResult result = backend_.exchange({blocks.data(), sizeof(Words), deadline_});
  if (result.state != TransferResult::State::kDone) lose_peers(result);
}

Verdict Collective::exchange_headers() {
  GroupState& state = backend_.state();
  header_.verdict = static_cast<uint8_t>(refusal_.code);
  const bool has_rows = send_rows_ != nullptr && refusal_.code == Code::kGo;
  if (!has_rows) state.sent.assign(state.sent.size(), pack(header_));
  for (size_t p = 0; p < state.sent.size() && has_rows; ++p) {
    header_.rows = static_cast<uint32_t>((*send_rows_)[p]);
    state.sent[p] = pack(header_);
  }
  exchange_words();

  Verdict verdict;
  for (size_t p = 0; p < state.received.size(); ++p) {
    if (is_intact(state.received[p])) continue;
    verdict.code = Code::kDamaged;
    verdict.culprit = static_cast<int>(p);
    verdict.a = checksum(state.received[p]);
    verdict.b = state.received[p][7];
    return verdict;
  }
  verdict = judge(state.received);
  if (verdict.code != Code::kGo) {
    headers_ = state.received;
    if (verdict.culprit == rank() && refusal_.code == verdict.code) {
      verdict.a = refusal_.a;
      verdict.b = refusal_.b;
    }
    return verdict;
  }
  for (size_t p = 0; p < state.received.size() && has_rows; ++p) {
    const int64_t announced = state.received[p][4];
    if (announced == (*recv_rows_)[p]) continue;
    verdict.code = Code::kRowsDiffer;
    verdict.culprit = static_cast<int>(p);
    verdict.a = announced;
    verdict.b = (*recv_rows_)[p];
    return verdict;
  }
  return verdict;
}

Verdict Collective::exchange_verdicts(const Verdict& mine) {
  GroupState& state = backend_.state();
  state.sent.assign(state.sent.size(), pack(mine, name()));
  exchange_words();
  std::vector<int> damaged;
  for (size_t p = 0; p < state.received.size(); ++p) {
    if (!is_intact(state.received[p])) damaged.push_back(static_cast<int>(p));
  }
  if (!damaged.empty()) {  // this rank cannot know what the others do next
    TransferResult result;
    result.state = TransferResult::State::kBroken;
    result.missing = damaged;
    result.text = "verdict=damaged by the way from rank(s) " + list_text(damaged);
    lose_peers(result);
  }
  const Verdict verdict = common_verdict(state.received);
  return verdict.code == Code::kGo ? judge_names(state.received) : verdict;
}

// ---- moving ------------------------------------------------------------------------------------
void Collective::run(const std::function<TransferResult()>& transfer) {
  TransferResult result;
  try {
    result = transfer();
  } catch (const Error& error) {
    result = broken_by(error);
  }
  if (result.state != TransferResult::State::kDone) lose_peers(result);
}

void Collective::move(int64_t unit_bytes) {
  if (!is_on_device()) return move_host(unit_bytes);
  run([&] {
    return backend_.exchange_device({state().blocks.data(), unit_bytes, deadline_}, stream_);
  });
}

void Collective::move_host(int64_t unit_bytes) {
  const TransferResult result =
      backend_.exchange({backend_.state().blocks.data(), unit_bytes, deadline_});
  if (result.state != TransferResult::State::kDone) lose_peers(result);
}

void Collective::copy_and_wait(const std::function<void(const kernels::Stream&)>& copy) {
  run([&] {
    copy(stream_);
    return backend_.wait_device(stream_, deadline_);
  });
}

void Collective::sum_device(void* data, int64_t count, kernels::DType dtype) {
  run([&] { return backend_.sum_device(data, count, dtype, stream_, deadline_); });
}

void Collective::lose_peers(const TransferResult& result) {
  ErrorDetail detail = detail_of(site_, op_, rank());
  detail.culprit = result.missing.empty() ? -1 : result.missing[0];
  const std::string ranks = list_text(result.missing);
  switch (result.state) {
    case TransferResult::State::kTimedOut:
      detail.argument = "timeout_ms";
      detail.value = to_text(backend_.state().timeout_ms);
      detail.limit = result.is_silent ? "has passed; nothing received from rank(s) " + ranks
                                      : "has passed; our data was not taken by rank(s) " + ranks;
      break;
    case TransferResult::State::kGone:
      detail.argument = "peer";
      detail.value = to_text(result.gone);
      detail.limit = "has left; nothing received from rank(s) " + ranks + ": " + result.text;
      break;
    default: {
      const size_t equals = result.text.find('=');
      detail.argument = result.text.substr(0, equals);
      detail.value = equals == std::string::npos ? "failed" : result.text.substr(equals + 1);
      break;
    }
  }
  PeerLost error(std::move(detail));
  fail(error.what(), true, error.detail().culprit);
  throw error;
}

void Collective::fail(const std::string& text, bool is_by_peer, int culprit) {
  GroupState& state = backend_.state();
  state.is_failed = true;
  state.is_failed_by_peer = is_by_peer;
  state.failed_culprit = culprit;
  state.failed_text = text;
  backend_.leave(text, culprit);
}

}  // namespace perseid::comm
