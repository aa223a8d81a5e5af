#pragma once
#include <c10/util/Exception.h>

#include <string>
#include <vector>

namespace perseid::testing {

/// Collects LibTorch's warnings while it lives, also those that a process gives only once.
class Warnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { texts.push_back(warning.msg()); }
  std::vector<std::string> texts;

 private:
  const c10::WarningUtils::WarningHandlerGuard handler_{this};
  const c10::WarningUtils::WarnAlways always_{true};
};

}  // namespace perseid::testing
