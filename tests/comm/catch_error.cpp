#include "ranks.h"

namespace perseid::testing {
namespace {

std::string type_of(const Error& error) {
  if (dynamic_cast<const ConfigError*>(&error) != nullptr) return "ConfigError";
  if (dynamic_cast<const DataError*>(&error) != nullptr) return "DataError";
  if (dynamic_cast<const OutOfMemory*>(&error) != nullptr) return "OutOfMemory";
  if (dynamic_cast<const PeerLost*>(&error) != nullptr) return "PeerLost";
  if (dynamic_cast<const RanksDisagree*>(&error) != nullptr) return "RanksDisagree";
  return "another Error";
}

}  // namespace

Caught catch_error(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return {type_of(error), error.what(), error.detail()};
  } catch (const std::exception& error) {
    return {"std::exception", error.what(), {}};
  }
  return {"none", "", {}};
}

void expect_contains(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    EXPECT_NE(text.find(part), std::string::npos) << "'" << part << "' is not in: " << text;
  }
}

}  // namespace perseid::testing
